//! Bounded fan-out: one child per item, so many at once.

use std::collections::BTreeMap;
use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context as Task, Poll};

use futures::Stream;

use super::{ChildEnd, Scope, ScopeEnd};
use crate::error::{ConfigError, Faults};

/// The most that may be in flight at once: each is a task.
const MOST_IN_FLIGHT: usize = 1 << 20;

impl<T: Send + 'static, E: Send + 'static> Scope<T, E> {
    /// Runs `child` for each item, at most `limit` at once, and hands out how each ended as it ends.
    ///
    /// Children that have ended count as in flight until they are taken, so a slow reader holds back new ones and no more
    /// than `limit` results wait for it. When the scope is cancelled or its deadline passes, what is there is handed out,
    /// those in flight are reported as cancelled, no further item is taken, and the whole
    /// [is partial](Mapped::is_partial). Children that were spawned before count and are reported too.
    ///
    /// # Errors
    ///
    /// A limit of 0, which could never start anything, or above 1,048,576.
    pub fn map<I, M, F>(self, items: I, limit: usize, child: M) -> Result<Mapped<T, E, I::IntoIter, M>, ConfigError>
    where
        I: IntoIterator,
        M: FnMut(I::Item) -> F,
        F: Future<Output = Result<T, E>> + Send + 'static,
    {
        let mut faults = Faults::of("scope");
        faults.check((1..=MOST_IN_FLIGHT).contains(&limit), "limit", &limit, "1 to 1048576");
        faults.into_result()?;
        Ok(Mapped { scope: self, items: items.into_iter(), child, limit, exhausted: false, cut: false })
    }
}

/// A stream of how children end, as they end; from [`Scope::map`].
///
/// Nothing is started before it is polled. Dropping it drops its scope.
#[must_use = "nothing is started before it is polled"]
pub struct Mapped<T, E, I, M> {
    scope: Scope<T, E>,
    items: I,
    child: M,
    limit: usize,
    /// There are no more items.
    exhausted: bool,
    /// Something is missing: a child's result, or an item.
    cut: bool,
}

/// Neither items nor closure are ever pinned.
impl<T, E, I, M> Unpin for Mapped<T, E, I, M> {}

impl<T, E, I, M> Mapped<T, E, I, M> {
    /// Whether something is missing: a child that has been reported was cut short or panicked, items are left, or one was
    /// lost to a panic. It is final once the stream has ended.
    pub const fn is_partial(&self) -> bool {
        self.cut || !self.exhausted
    }

    /// The scope, to cancel it.
    ///
    /// ```
    /// # use resile::Scope;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let pages = Scope::new().map(1..=3, 1, |page| async move { Ok::<_, ()>(page) });
    /// let mut pages = pages?;
    /// assert!(pages.next().await.is_some());
    /// pages.scope().cancel_with("found");
    /// assert!(pages.next().await.is_none(), "no further one is started");
    /// assert!(pages.is_partial());
    /// # Ok(()) }
    /// ```
    pub const fn scope(&self) -> &Scope<T, E> {
        &self.scope
    }

    /// The items that were not started. Children in flight are aborted.
    ///
    /// ```
    /// # use resile::Scope;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let mut pages = Scope::new().map(1..=5, 2, |page| async move { Ok::<_, ()>(page) })?;
    /// assert!(pages.next().await.is_some());
    /// assert!(pages.into_rest().eq(3..=5));
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn into_rest(self) -> I {
        self.items
    }
}

impl<T, E, I, M, F> Mapped<T, E, I, M>
where
    T: Send + 'static,
    E: Send + 'static,
    I: Iterator,
    M: FnMut(I::Item) -> F,
    F: Future<Output = Result<T, E>> + Send + 'static,
{
    /// Waits for the next child that ends, and says which it was, counted from 0: `None` when there are no more.
    ///
    /// # Cancel safety
    ///
    /// Nothing is lost if it is dropped.
    pub async fn next(&mut self) -> Option<(usize, ChildEnd<T, E>)> {
        poll_fn(|cx| self.poll_ended(cx)).await
    }

    /// Waits for the rest and says how each ended, in the order of the items.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), resile::ConfigError> {
    /// let doubled = resile::Scope::new().map(1..=4, 2, |n| async move { Ok::<_, ()>(n * 2) })?.wait().await;
    /// assert!(!doubled.is_partial());
    /// assert_eq!(doubled.into_values(), [2, 4, 6, 8]);
    /// # Ok(()) }
    /// ```
    pub async fn wait(mut self) -> ScopeEnd<T, E> {
        let mut ended = BTreeMap::new();
        while let Some((index, end)) = self.next().await {
            ended.insert(index, end);
        }
        self.scope.finish(ended, self.is_partial())
    }

    fn poll_ended(&mut self, cx: &mut Task<'_>) -> Poll<Option<(usize, ChildEnd<T, E>)>> {
        while !self.exhausted && self.scope.len() < self.limit && self.scope.link.closed().is_none() {
            // Stays so if the iterator or the closure panics: an item is lost then.
            let cut = std::mem::replace(&mut self.cut, true);
            match self.items.next() {
                Some(item) => self.scope.spawn((self.child)(item)),
                None => self.exhausted = true,
            }
            self.cut = cut;
        }
        let ended = self.scope.poll_ended(cx);
        if let Poll::Ready(Some((_, end))) = &ended {
            self.cut |= end.is_missing();
        }
        ended
    }
}

impl<T, E, I, M, F> Stream for Mapped<T, E, I, M>
where
    T: Send + 'static,
    E: Send + 'static,
    I: Iterator,
    M: FnMut(I::Item) -> F,
    F: Future<Output = Result<T, E>> + Send + 'static,
{
    type Item = (usize, ChildEnd<T, E>);

    fn poll_next(self: Pin<&mut Self>, cx: &mut Task<'_>) -> Poll<Option<Self::Item>> {
        self.get_mut().poll_ended(cx)
    }
}

impl<T, E, I, M> fmt::Debug for Mapped<T, E, I, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapped")
            .field("scope", &self.scope)
            .field("limit", &self.limit)
            .field("exhausted", &self.exhausted)
            .finish_non_exhaustive()
    }
}
