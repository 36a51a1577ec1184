//! Randomness for jitter: a stateless mix, so that a call needs no generator of its own.

/// Mixes 64 bits so that neighbours in give strangers out (the finaliser of `SplitMix64`, Steele, Lea and Flood 2014).
pub(crate) fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A fresh seed from the thread's generator, which the operating system seeds.
pub(crate) fn entropy() -> u64 {
    rand::random()
}

/// A number in `0..=max`, uniform but for a bias below 2^-64, from 64 random bits.
pub(crate) fn up_to(bits: u64, max: u64) -> u64 {
    ((u128::from(bits) * (u128::from(max) + 1)) >> 64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn up_to_reaches_both_ends_and_never_passes_them() {
        assert_eq!(up_to(0, 10), 0);
        assert_eq!(up_to(u64::MAX, 10), 10);
        assert_eq!(up_to(u64::MAX, u64::MAX), u64::MAX);
        assert_eq!(up_to(u64::MAX, 0), 0);
    }

    #[test]
    fn mixed_neighbours_fill_ten_bins_evenly() {
        let mut bins = [0_u32; 10];
        for i in 0..100_000 {
            bins[up_to(mix(i), 9) as usize] += 1;
        }
        assert!(bins.iter().all(|n| (9_500..10_500).contains(n)), "{bins:?}");
    }
}
