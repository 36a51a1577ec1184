//! Models of every interleaving, run under `--cfg resile_loom`.
