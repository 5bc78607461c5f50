//! One behaviour suite for every store: generic functions over `Arc<dyn Store>`, run against each backend, and
//! after them what only one backend has.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod behaviour;
mod leases;
mod support;
mod watches;

/// One test per behaviour for the store that `$open` gives, with what must live as long as the store.
macro_rules! suite {
    ($open:expr; $($module:ident::$name:ident),* $(,)?) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                let (store, _alive) = $open.await;
                $crate::$module::$name(store).await;
            }
        )*
    };
}

/// Every behaviour.
macro_rules! whole_suite {
    ($open:expr) => {
        suite! { $open;
            behaviour::a_conflict_names_its_key,
            behaviour::a_revision_of_zero_is_no_absence,
            behaviour::a_transaction_is_all_or_nothing,
            behaviour::a_key_is_changed_once_per_transaction,
            behaviour::nothing_changed_is_no_revision,
            behaviour::revisions_tell_creation_from_change,
            behaviour::increments_by_compare_and_swap_lose_nothing,
            behaviour::prefixes_are_apart,
            watches::list_then_watch_has_no_gaps,
            watches::a_watch_starts_in_the_past_or_in_the_future,
            watches::a_watch_sees_its_prefix_alone,
            watches::one_revision_comes_whole_and_in_order,
            leases::keys_die_with_a_revoked_lease,
            leases::a_dropped_lease_runs_out,
            leases::a_held_lease_does_not_run_out,
            leases::an_unknown_lease_is_refused,
            leases::a_key_taken_from_a_lease_outlives_it,
        }
    };
}

mod embedded;
#[cfg(feature = "etcd")]
mod etcd;
