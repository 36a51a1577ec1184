//! Puts every change into the source, each behind a switch.
//!
//! All edits are insertions around a range that stays as it is, so that changes may lie inside one another:
//! `a + b` becomes `(if crate::mutant(7) { a - b } else { a + b })`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use anyhow::{Context, Result, bail};
use proc_macro2::{Span, TokenStream};
use serde_json::Value;
use syn::spanned::Spanned;
use syn::visit::{self, Visit};
use syn::{BinOp, Expr, ReturnType, Stmt, Type, UnOp};

/// A file of the crate, and what is inserted into it.
pub struct Source {
    /// Below the root of the crate.
    pub path: PathBuf,
    pub text: String,
    pub edits: Vec<Edit>,
}

/// Two insertions around a range of the source.
pub struct Edit {
    mutant: u32,
    range: Range<usize>,
    before: String,
    after: String,
}

/// One change.
#[derive(Debug, Clone)]
pub struct Mutant {
    pub id: u32,
    path: PathBuf,
    line: usize,
    function: String,
    change: String,
}

impl Mutant {
    /// What the table of survivors knows the mutant by; it holds no line, which would go stale.
    pub fn key(&self) -> String {
        format!("`{}`: `{}` | {}", self.path.display(), self.function, self.change)
    }
}

impl fmt::Display for Mutant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}:{} {}", self.id, self.path.display(), self.line, self.key())
    }
}

/// Finds the changes in all files and notes their insertions.
pub fn mutants(sources: &mut [Source]) -> Vec<Mutant> {
    let mut mutants = Vec::new();
    for source in sources {
        let Ok(file) = syn::parse_file(&source.text) else { continue };
        let mut finder = Finder { source, mutants: &mut mutants, scope: Vec::new() };
        finder.visit_file(&file);
    }
    mutants
}

/// Walks one file.
struct Finder<'a> {
    source: &'a mut Source,
    mutants: &'a mut Vec<Mutant>,
    /// The names of the items around, for the reader.
    scope: Vec<String>,
}

impl Finder<'_> {
    fn text(&self, span: Span) -> String {
        self.source.text[span.byte_range()].to_owned()
    }

    /// Notes a change of `range`; `make` gives the texts before and after it, from the number of the switch.
    fn add(&mut self, span: Span, range: Range<usize>, change: &str, make: impl FnOnce(u32) -> (String, String)) {
        let id = u32::try_from(self.mutants.len()).expect("fewer changes than 2^32") + 1;
        let (before, after) = make(id);
        let change = change.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "¦");
        self.mutants.push(Mutant {
            id,
            path: self.source.path.clone(),
            line: span.start().line,
            function: self.scope.join("::"),
            change,
        });
        self.source.edits.push(Edit { mutant: id, range, before, after });
    }

    /// `original` becomes `changed`, as an expression.
    fn replace(&mut self, span: Span, changed: &str) {
        let change = format!("`{}` → `{changed}`", self.text(span));
        self.add(span, span.byte_range(), &change, |id| {
            (format!("(if crate::mutant({id}) {{ {changed} }} else {{ "), " })".to_owned())
        });
    }

    fn binary(&mut self, whole: Span, left: &Expr, op: &BinOp, right: &Expr) {
        let others: &[&str] = match op {
            BinOp::Eq(_) => &["!="],
            BinOp::Ne(_) => &["=="],
            BinOp::Lt(_) => &["<=", ">="],
            BinOp::Le(_) => &["<", ">"],
            BinOp::Gt(_) => &[">=", "<="],
            BinOp::Ge(_) => &[">", "<"],
            BinOp::And(_) if !has_let(left) && !has_let(right) => &["||"],
            BinOp::Or(_) => &["&&"],
            BinOp::Add(_) => &["-"],
            BinOp::Sub(_) => &["+"],
            BinOp::Mul(_) => &["/"],
            BinOp::Div(_) => &["*"],
            BinOp::Rem(_) => &["/"],
            BinOp::BitAnd(_) => &["|"],
            BinOp::BitOr(_) => &["&"],
            BinOp::BitXor(_) => &["|"],
            BinOp::Shl(_) => &[">>"],
            BinOp::Shr(_) => &["<<"],
            BinOp::AddAssign(_) => &["-="],
            BinOp::SubAssign(_) => &["+="],
            BinOp::BitOrAssign(_) => &["&="],
            BinOp::BitAndAssign(_) => &["|="],
            _ => &[],
        };
        for other in others {
            let changed = format!("{} {other} {}", self.text(left.span()), self.text(right.span()));
            self.replace(whole, &changed);
        }
    }

    /// `base` with its operator at `at` spelled otherwise, for methods such as `min`.
    fn method(&mut self, call: &syn::ExprMethodCall) {
        let other = match call.method.to_string().as_str() {
            "min" => "max",
            "max" => "min",
            "saturating_sub" => "saturating_add",
            "saturating_add" => "saturating_sub",
            "wrapping_sub" => "wrapping_add",
            "wrapping_add" => "wrapping_sub",
            "div_ceil" => "div_euclid",
            "is_some" => "is_none",
            "is_none" => "is_some",
            "any" => "all",
            "all" => "any",
            _ => return,
        };
        let (whole, name) = (call.span().byte_range(), call.method.span().byte_range());
        let mut changed = self.text(call.span());
        changed.replace_range(name.start - whole.start..name.end - whole.start, other);
        self.replace(call.span(), &changed);
    }

    /// The condition of an `if`, a `while` or a guard, the other way round.
    fn condition(&mut self, condition: &Expr) {
        // A comparison and a negation have changes of their own that do the same.
        if has_let(condition) || matches!(condition, Expr::Binary(_) | Expr::Unary(_) | Expr::Lit(_)) {
            return;
        }
        let changed = format!("!({})", self.text(condition.span()));
        self.replace(condition.span(), &changed);
    }

    /// The body of a function replaced by a value that says nothing.
    fn body(&mut self, output: &ReturnType, block: &syn::Block) {
        let values: Vec<String> = match output {
            ReturnType::Default => vec![String::new()],
            ReturnType::Type(_, kind) => nothing(kind),
        };
        if block.stmts.len() < 2 && values == [String::new()] {
            return; // Leaving out its only statement is the same.
        }
        let at = block.brace_token.span.open().byte_range().end;
        for value in values {
            let change = format!("the body → `{}`", if value.is_empty() { "()" } else { &value });
            self.add(block.brace_token.span.open(), at..at, &change, |id| {
                (format!(" if crate::mutant({id}) {{ return {value}; }}"), String::new())
            });
        }
    }

    fn function(&mut self, signature: &syn::Signature, block: &syn::Block) {
        if signature.constness.is_some() {
            return;
        }
        self.scope.push(signature.ident.to_string());
        self.body(&signature.output, block);
        visit::visit_block(self, block);
        self.scope.pop();
    }
}

impl<'ast> Visit<'ast> for Finder<'_> {
    fn visit_item(&mut self, item: &'ast syn::Item) {
        let attributes = match item {
            syn::Item::Fn(item) => &item.attrs,
            syn::Item::Mod(item) => &item.attrs,
            syn::Item::Impl(item) => &item.attrs,
            _ => return visit::visit_item(self, item),
        };
        if !attributes.iter().any(is_test) {
            visit::visit_item(self, item);
        }
    }

    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        self.function(&item.sig, &item.block);
    }

    fn visit_item_impl(&mut self, item: &'ast syn::ItemImpl) {
        let name = |tokens: TokenStream| tokens.to_string().split(['<', ' ']).next().unwrap_or_default().to_owned();
        let kind = &item.self_ty;
        let mut scope = name(quote::quote!(#kind));
        if let Some((_, path, _)) = &item.trait_ {
            let last = path.segments.last().map(|segment| segment.ident.to_string()).unwrap_or_default();
            // What an operator reads of a machine's inside is not what it decides.
            if last == "Debug" {
                return;
            }
            scope = format!("{scope}: {last}");
        }
        self.scope.push(scope);
        visit::visit_item_impl(self, item);
        self.scope.pop();
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        if !item.attrs.iter().any(is_test) {
            self.function(&item.sig, &item.block);
        }
    }

    fn visit_trait_item_fn(&mut self, item: &'ast syn::TraitItemFn) {
        if let Some(block) = &item.default {
            self.function(&item.sig, block);
        }
    }

    // A constant can't ask a switch.
    fn visit_item_const(&mut self, _: &'ast syn::ItemConst) {}
    fn visit_impl_item_const(&mut self, _: &'ast syn::ImplItemConst) {}
    fn visit_item_static(&mut self, _: &'ast syn::ItemStatic) {}
    fn visit_type(&mut self, _: &'ast Type) {}
    fn visit_pat(&mut self, _: &'ast syn::Pat) {}
    fn visit_attribute(&mut self, _: &'ast syn::Attribute) {}
    fn visit_generic_argument(&mut self, _: &'ast syn::GenericArgument) {}
    fn visit_expr_const(&mut self, _: &'ast syn::ExprConst) {}

    fn visit_arm(&mut self, arm: &'ast syn::Arm) {
        if let Some((_, guard)) = &arm.guard {
            self.condition(guard);
            self.visit_expr(guard);
        }
        self.visit_expr(&arm.body);
    }

    fn visit_expr_if(&mut self, expr: &'ast syn::ExprIf) {
        self.condition(&expr.cond);
        visit::visit_expr_if(self, expr);
    }

    fn visit_expr_while(&mut self, expr: &'ast syn::ExprWhile) {
        visit::visit_expr_while(self, expr);
    }

    fn visit_expr_binary(&mut self, expr: &'ast syn::ExprBinary) {
        self.binary(expr.span(), &expr.left, &expr.op, &expr.right);
        visit::visit_expr_binary(self, expr);
    }

    fn visit_expr_unary(&mut self, expr: &'ast syn::ExprUnary) {
        if matches!(expr.op, UnOp::Not(_) | UnOp::Neg(_)) {
            let changed = self.text(expr.expr.span());
            self.replace(expr.span(), &changed);
        }
        visit::visit_expr_unary(self, expr);
    }

    fn visit_expr_method_call(&mut self, expr: &'ast syn::ExprMethodCall) {
        self.method(expr);
        visit::visit_expr_method_call(self, expr);
    }

    fn visit_expr_macro(&mut self, expr: &'ast syn::ExprMacro) {
        if expr.mac.path.is_ident("matches") {
            let changed = format!("!{}", self.text(expr.span()));
            self.replace(expr.span(), &changed);
        }
    }

    fn visit_stmt(&mut self, statement: &'ast Stmt) {
        if let Stmt::Expr(expr, Some(_)) = statement
            && matches!(expr, Expr::MethodCall(_) | Expr::Call(_) | Expr::Assign(_) | Expr::Binary(_))
        {
            let span = statement.span();
            let change = format!("without `{}`", self.text(span));
            self.add(span, span.byte_range(), &change, |id| (format!("if !crate::mutant({id}) {{ "), " }".to_owned()));
        }
        visit::visit_stmt(self, statement);
    }
}

/// Whether the item exists in tests or models only.
fn is_test(attribute: &syn::Attribute) -> bool {
    let tokens = quote::quote!(#attribute).to_string();
    let only = |word: &str| tokens.contains(word) && !tokens.contains(&format!("not ({word})"));
    tokens.contains("cfg") && (only("test") || only("resile_loom"))
}

/// Whether the condition binds a name.
fn has_let(expr: &Expr) -> bool {
    match expr {
        Expr::Let(_) => true,
        Expr::Binary(binary) => has_let(&binary.left) || has_let(&binary.right),
        Expr::Paren(inner) => has_let(&inner.expr),
        _ => false,
    }
}

/// Values of the type that say nothing.
fn nothing(kind: &Type) -> Vec<String> {
    let text = quote::quote!(#kind).to_string().replace(' ', "");
    let values: &[&str] = match text.as_str() {
        "bool" => &["true", "false"],
        "u8" | "u16" | "u32" | "u64" | "u128" | "usize" | "i32" | "i64" => &["0", "1"],
        "f64" => &["0.0", "1.0"],
        "Duration" => &["Duration::ZERO"],
        text if text.starts_with("Option<") => &["None"],
        text if text.starts_with("Poll<") => &["Poll::Pending"],
        text if text.starts_with("Result<()") => &["Ok(())"],
        _ => &[],
    };
    values.iter().map(|&value| value.to_owned()).collect()
}

/// The text with its insertions but those of excluded mutants, and where each mutant has come to lie.
fn render(source: &Source, excluded: &BTreeSet<u32>) -> (String, Vec<(u32, Range<usize>)>) {
    let mut edits: Vec<&Edit> = source.edits.iter().filter(|edit| !excluded.contains(&edit.mutant)).collect();
    // The outer one first, at one place the one noted first.
    edits.sort_by_key(|edit| (edit.range.start, usize::MAX - edit.range.end, edit.mutant));
    let mut text = String::new();
    let mut places = Vec::new();
    let mut open: Vec<(&Edit, usize)> = Vec::new();
    let mut at = 0;
    let mut close = |until: usize, text: &mut String, at: &mut usize, open: &mut Vec<(&Edit, usize)>| {
        while let Some((edit, began)) = open.last().copied()
            && edit.range.end <= until
        {
            text.push_str(&source.text[*at..edit.range.end]);
            *at = edit.range.end;
            text.push_str(&edit.after);
            places.push((edit.mutant, began..text.len()));
            open.pop();
        }
    };
    for edit in edits {
        close(edit.range.start, &mut text, &mut at, &mut open);
        text.push_str(&source.text[at..edit.range.start]);
        at = edit.range.start;
        open.push((edit, text.len()));
        text.push_str(&edit.before);
    }
    close(usize::MAX, &mut text, &mut at, &mut open);
    text.push_str(&source.text[at..]);
    (text, places)
}

/// The switch, as a part of the crate.
const SWITCH: &str = r#"
#[doc(hidden)]
#[allow(warnings, clippy::all)]
pub(crate) fn mutant(id: u32) -> bool {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicBool, Ordering};
    static ACTIVE: OnceLock<u32> = OnceLock::new();
    static COVER: OnceLock<Option<String>> = OnceLock::new();
    static SEEN: [AtomicBool; 1 << 14] = [const { AtomicBool::new(false) }; 1 << 14];
    if let Some(cover) = COVER.get_or_init(|| std::env::var("RESILE_COVER").ok()) {
        if !SEEN[id as usize].swap(true, Ordering::Relaxed) {
            use std::io::Write;
            let file = std::fs::OpenOptions::new().append(true).create(true).open(cover);
            file.and_then(|mut file| file.write_all(format!("{id}\n").as_bytes())).unwrap();
        }
        return false;
    }
    *ACTIVE.get_or_init(|| std::env::var("RESILE_MUTANT").ok().and_then(|id| id.parse().ok()).unwrap_or(0)) == id
}
"#;

/// Writes the changed crate, and leaves out change by change what doesn't compile. Returns what was left out.
pub fn compile(tree: &Path, work: &Path, sources: &[Source], mutants: &[Mutant]) -> Result<BTreeSet<u32>> {
    let mut excluded = BTreeSet::new();
    let root = tree.join("src/lib.rs");
    let lib = fs::read_to_string(&root)?;
    if !lib.contains(SWITCH) {
        fs::write(&root, format!("{lib}{SWITCH}"))?;
    }
    for _ in 0..30 {
        let mut places = BTreeMap::new();
        for source in sources {
            let (text, there) = render(source, &excluded);
            let path = tree.join(&source.path);
            if fs::read_to_string(&path).ok().as_ref() != Some(&text) {
                fs::write(path, text)?;
            }
            places.insert(source.path.to_string_lossy().into_owned(), there);
        }
        let errors = check(tree, work)?;
        if errors.is_empty() {
            return Ok(excluded);
        }
        let known = excluded.len();
        for (file, range, message) in errors {
            // The innermost change that holds the place of the error; or else the `drop` before it, which, left out,
            // leaves borrowed what the rest moves.
            let guilty = places.get(&file).and_then(|there| {
                there
                    .iter()
                    .filter(|(_, place)| place.start <= range.start && range.end <= place.end)
                    .min_by_key(|(_, place)| place.len())
                    .or_else(|| {
                        let drops = there.iter().filter(|(id, _)| mutants[*id as usize - 1].change.contains("drop("));
                        drops.filter(|(_, place)| place.end <= range.start).max_by_key(|(_, place)| place.end)
                    })
            });
            match guilty {
                Some((id, _)) => {
                    if excluded.insert(*id) && env::var_os("RESILE_VERBOSE").is_some() {
                        println!("   {message}: {}", mutants[*id as usize - 1]);
                    }
                }
                None => bail!("{file}: {message}, and no change holds its place"),
            }
        }
        if excluded.len() == known {
            bail!("the changed crate doesn't compile");
        }
    }
    bail!("the changed crate doesn't compile after thirty rounds");
}

/// The errors of a build: file, place and message.
fn check(tree: &Path, work: &Path) -> Result<Vec<(String, Range<usize>, String)>> {
    let output = command(tree, work).args(["check", "--lib", "--message-format=json"]).output()?;
    let mut errors = Vec::new();
    for line in String::from_utf8(output.stdout)?.lines() {
        let line: Value = serde_json::from_str(line)?;
        let message = &line["message"];
        if message["level"] != "error" {
            continue;
        }
        for span in message["spans"].as_array().into_iter().flatten().filter(|span| span["is_primary"] == true) {
            let at = |name: &str| span[name].as_u64().and_then(|at| usize::try_from(at).ok()).context("a place");
            let file = span["file_name"].as_str().context("a file")?.to_owned();
            errors.push((file, at("byte_start")?..at("byte_end")?, message["message"].to_string()));
        }
    }
    if errors.is_empty() && !output.status.success() {
        bail!("cargo check failed:\n{}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(errors)
}

/// Cargo in the copy, with a build directory of its own and silent about what the changes make odd.
pub fn command(tree: &Path, work: &Path) -> Command {
    let mut command = Command::new("cargo");
    command.current_dir(tree).env("CARGO_TARGET_DIR", work.join("build")).env("RUSTFLAGS", "-A warnings");
    command.env("CARGO_PROFILE_DEV_DEBUG", "false").env("CARGO_PROFILE_TEST_DEBUG", "false");
    // The tests run some thousand times, so a slower build pays.
    command.env("CARGO_PROFILE_DEV_OPT_LEVEL", "1").env("CARGO_PROFILE_TEST_OPT_LEVEL", "1");
    command
}
