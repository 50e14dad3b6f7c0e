//! Tests of [`super`].
#![allow(clippy::unwrap_used)]

use super::*;

const NOW: Duration = Duration::ZERO;
/// Where nothing is known to be fetched.
const NOTHING: i64 = 0;

fn offsets(group: &Group<&str>) -> Vec<(i32, i64)> {
    let mut offsets: Vec<_> =
        group.iter().map(|taken| (taken.ticket.partition, taken.ticket.offset)).collect();
    offsets.sort_unstable();
    offsets
}

#[test]
fn only_contiguous_outcomes_are_published() {
    let ledger = Ledger::default();
    ledger.assign([0, 1]);
    let tickets: Vec<_> = [5, 6, 9].map(|offset| ledger.open(0, offset, 10).unwrap()).into();
    let other = ledger.open(1, 3, 10).unwrap();
    ledger.complete(tickets[2], "late");
    ledger.complete(tickets[1], "middle");
    assert_eq!(ledger.queued(), Queued { unscored: 20, unpublished: 20 });
    assert!(ledger.take(1000, NOW, NOW).is_empty());
    ledger.complete(other, "other");
    ledger.complete(tickets[0], "first");
    let group = ledger.take(1000, NOW, NOW);
    assert_eq!(offsets(&group), [(0, 5), (0, 6), (0, 9), (1, 3)]);
    assert_eq!(Ledger::commit_points(&group), HashMap::from([(0, 10), (1, 4)]));
    assert_eq!(ledger.tokens(), 40);
    assert_eq!(ledger.queued(), Queued::default());
    assert!(!ledger.is_drained());
    ledger.release(&group);
    assert_eq!(ledger.tokens(), 0);
    assert!(ledger.is_drained());
}

#[test]
fn a_partition_that_comes_back_does_not_take_old_outcomes() {
    let ledger = Ledger::default();
    ledger.assign([0]);
    let old = ledger.open(0, 5, 10).unwrap();
    ledger.revoke([0]);
    assert_eq!(ledger.tokens(), 0);
    assert_eq!(ledger.open(0, 6, 10), None);
    ledger.assign([0]);
    let new = ledger.open(0, 5, 10).unwrap();
    ledger.complete(old, "stale");
    assert!(ledger.take(1000, NOW, NOW).is_empty());
    ledger.complete(new, "fresh");
    assert_eq!(ledger.take(1000, NOW, NOW)[0].outcome, "fresh");
}

#[test]
fn what_was_taken_away_while_publishing_is_not_committed() {
    let ledger = Ledger::default();
    ledger.assign([0, 1]);
    for partition in [0, 1] {
        let ticket = ledger.open(partition, 0, 7).unwrap();
        ledger.complete(ticket, "x");
    }
    let mut group = ledger.take(1000, NOW, NOW);
    ledger.revoke([0]);
    ledger.assign([0]);
    ledger.drop_revoked(&mut group);
    assert_eq!(Ledger::commit_points(&group), HashMap::from([(1, 1)]));
    assert_eq!(ledger.tokens(), 7);
    ledger.release(&group);
    assert!(ledger.is_drained());
}

#[test]
fn lag_counts_what_is_not_published_yet() {
    let ledger = Ledger::default();
    assert_eq!(ledger.lag(0, 10, NOTHING, 30), None);
    ledger.assign([0]);
    assert_eq!(ledger.lag(0, 10, NOTHING, 30), Some(20), "from the committed offset");
    assert_eq!(ledger.lag(0, -1001, NOTHING, 30), Some(30), "from the start where nothing was committed");
    let ticket = ledger.open(0, 10, 1).unwrap();
    ledger.open(0, 11, 1).unwrap();
    assert_eq!(ledger.lag(0, 10, NOTHING, 30), Some(20), "what is read is not published");
    ledger.complete(ticket, "x");
    assert_eq!(ledger.take(1000, NOW, NOW).len(), 1);
    assert_eq!(ledger.lag(0, 10, NOTHING, 30), Some(19));
    assert_eq!(ledger.lag(0, 10, 30, 30), Some(19), "what is in flight is not done");
}

#[test]
fn offsets_that_hold_no_record_are_no_lag() {
    let ledger = Ledger::default();
    ledger.assign([0]);
    assert_eq!(ledger.lag(0, 10, 30, 30), Some(0), "nothing but marks since the last commit");
    let ticket = ledger.open(0, 31, 1).unwrap();
    ledger.complete(ticket, "x");
    assert_eq!(ledger.take(1000, NOW, NOW).len(), 1);
    assert_eq!(ledger.lag(0, 10, 34, 40), Some(6), "a mark after the last record");
}

#[test]
fn groups_are_cut_at_about_the_size_asked_for() {
    let ledger = Ledger::default();
    ledger.assign([0]);
    for offset in 0..10 {
        let ticket = ledger.open(0, offset, 10).unwrap();
        ledger.complete(ticket, "x");
    }
    assert_eq!(ledger.take(25, NOW, NOW).len(), 3);
    assert!(!ledger.wait_drained(&[0], Duration::from_millis(1)));
}

#[test]
fn what_the_model_has_not_all_of_is_left_for_the_next_reader() {
    let ledger = Ledger::default();
    ledger.assign([0, 1]);
    let tickets: Vec<_> = [5, 6, 7].map(|offset| ledger.open(0, offset, 10).unwrap()).into();
    let other = ledger.open(1, 1, 10).unwrap();
    ledger.hand_over(tickets[0]);
    ledger.hand_over(tickets[2]);
    ledger.complete(tickets[2], "cannot be committed before what lies between");
    ledger.forget_waiting(&[0]);
    assert_eq!(ledger.tokens(), 20);
    assert!(ledger.is_wanted(tickets[0]) && !ledger.is_wanted(tickets[1]), "one was forgotten");
    ledger.complete(tickets[2], "stale");
    assert!(ledger.take(1000, NOW, NOW).is_empty());
    ledger.complete(tickets[0], "first");
    assert_eq!(offsets(&ledger.take(1000, NOW, NOW)), [(0, 5)]);
    assert!(ledger.is_wanted(other), "the other partition is as it was");
    assert_eq!(ledger.lag(0, 5, NOTHING, 8), Some(2), "what was forgotten is still to be done");
}

#[test]
fn a_group_waits_for_more_only_while_more_can_come() {
    const LONG: Duration = Duration::from_mins(1);
    let ledger = Ledger::default();
    ledger.assign([0]);
    let tickets: Vec<_> = [0, 1, 2].map(|offset| ledger.open(0, offset, 10).unwrap()).into();
    ledger.complete(tickets[0], "x");
    assert_eq!(ledger.take(1000, LONG, Duration::from_millis(20)).len(), 1, "the delay has an end");
    ledger.complete(tickets[1], "x");
    assert_eq!(ledger.take(10, LONG, LONG).len(), 1, "the group is full");
    ledger.complete(tickets[2], "x");
    assert_eq!(ledger.take(1000, LONG, LONG).len(), 1, "nothing else is in flight");
}

#[test]
fn the_oldest_record_ages_until_it_is_released() {
    let ledger = Ledger::default();
    ledger.assign([0]);
    assert_eq!(ledger.oldest_age(), Duration::ZERO);
    let ticket = ledger.open(0, 0, 1).unwrap();
    ledger.complete(ticket, "x");
    let group = ledger.take(1000, NOW, NOW);
    std::thread::sleep(Duration::from_millis(2));
    assert!(ledger.oldest_age() >= Duration::from_millis(2));
    ledger.release(&group);
    assert_eq!(ledger.oldest_age(), Duration::ZERO);
}

#[test]
fn nothing_is_opened_in_a_closed_ledger_and_what_the_model_has_is_finished() {
    let ledger = Ledger::default();
    ledger.assign([0]);
    assert!(!ledger.is_finished(), "a record may still come");
    let handed_over = ledger.open(0, 5, 10).unwrap();
    ledger.hand_over(handed_over);
    let waiting = ledger.open(0, 6, 10).unwrap();
    ledger.close();
    assert!(ledger.open(0, 7, 10).is_none());
    assert!(!ledger.is_wanted(waiting));
    assert!(!ledger.is_finished());
    ledger.complete(handed_over, "the model has it");
    let group = ledger.take(1000, NOW, NOW);
    assert_eq!(offsets(&group), [(0, 5)]);
    ledger.release(&group);
    assert!(ledger.is_finished());
}

#[test]
fn a_record_that_is_read_again_is_not_opened_again() {
    let ledger = Ledger::<&str>::default();
    ledger.assign([0]);
    assert!(ledger.open(0, 5, 10).is_some() && ledger.open(0, 8, 10).is_some());
    assert!(ledger.open(0, 8, 10).is_none() && ledger.open(0, 6, 10).is_none());
    assert!(ledger.open(0, 9, 10).is_some());
    ledger.assign([0]);
    assert!(ledger.open(0, 5, 10).is_some(), "another assignment begins where it is told to");
}
