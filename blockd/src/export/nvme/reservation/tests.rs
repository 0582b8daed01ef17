use super::*;
use crate::types::VolumeId;

const A: HostId = [1; 16];
const B: HostId = [2; 16];
const C: HostId = [3; 16];

fn three() -> Reservations {
    let mut state = Reservations::default();
    for (host, key) in [(A, 10), (B, 20), (C, 30)] {
        state.apply(host, Request::Register { key }).unwrap();
    }
    state
}

fn may(state: &Reservations, host: HostId) -> (bool, bool) {
    (state.check(&host, Access::Read).is_ok(), state.check(&host, Access::Write).is_ok())
}

#[test]
fn each_kind_admits_whom_it_should() {
    const STRANGER: HostId = [9; 16];
    let table = [
        (Kind::WriteExclusive, (true, false), (true, false)),
        (Kind::ExclusiveAccess, (false, false), (false, false)),
        (Kind::WriteExclusiveRegistrants, (true, true), (true, false)),
        (Kind::ExclusiveAccessRegistrants, (true, true), (false, false)),
        (Kind::WriteExclusiveAll, (true, true), (true, false)),
        (Kind::ExclusiveAccessAll, (true, true), (false, false)),
    ];
    for (kind, registrant, stranger) in table {
        let mut state = three();
        assert_eq!(may(&state, STRANGER), (true, true), "nothing is reserved yet");
        assert_eq!(
            state.apply(STRANGER, Request::Acquire { current: 0, kind }),
            Err(Status::RESERVATION_CONFLICT),
            "only registrants"
        );
        assert_eq!(state.apply(A, Request::Acquire { current: 11, kind }), Err(Status::RESERVATION_CONFLICT));
        state.apply(A, Request::Acquire { current: 10, kind }).unwrap();
        assert_eq!(may(&state, A), (true, true));
        assert_eq!(may(&state, B), registrant, "{kind:?}");
        assert_eq!(may(&state, STRANGER), stranger, "{kind:?}");
        // Again is no error for a holder.
        state.apply(A, Request::Acquire { current: 10, kind }).unwrap();
        let again = state.apply(B, Request::Acquire { current: 20, kind });
        assert_eq!(again.is_ok(), kind.held_by_all());
    }
}

#[test]
fn keys_are_registered_replaced_and_taken_back() {
    let mut state = Reservations::default();
    state.apply(A, Request::Register { key: 1 }).unwrap();
    state.apply(A, Request::Register { key: 1 }).unwrap();
    assert_eq!(state.generation, 1);
    assert!(state.apply(A, Request::Register { key: 2 }).is_err());
    assert!(state.apply(A, Request::Replace { current: 2, key: 3, ignore_current: false }).is_err());
    state.apply(A, Request::Replace { current: 2, key: 3, ignore_current: true }).unwrap();
    assert!(state.apply(B, Request::Replace { current: 0, key: 3, ignore_current: true }).is_err());
    assert!(state.apply(A, Request::Unregister { current: 1, ignore_current: false }).is_err());
    state.apply(A, Request::Unregister { current: 3, ignore_current: false }).unwrap();
    assert_eq!((state.registrants.len(), state.generation), (0, 3));
}

#[test]
fn a_holder_that_unregisters_lets_go() {
    let mut state = three();
    state.apply(A, Request::Acquire { current: 10, kind: Kind::WriteExclusiveRegistrants }).unwrap();
    let told = state.apply(A, Request::Unregister { current: 10, ignore_current: false }).unwrap();
    assert_eq!(told, [(B, Notice::ReservationReleased), (C, Notice::ReservationReleased)]);
    assert_eq!(state.held, None);

    let mut state = three();
    state.apply(A, Request::Acquire { current: 10, kind: Kind::ExclusiveAccessAll }).unwrap();
    for (host, key) in [(A, 10), (B, 20)] {
        state.apply(host, Request::Unregister { current: key, ignore_current: false }).unwrap();
        assert!(state.held.is_some(), "the others hold it still");
    }
    state.apply(C, Request::Unregister { current: 30, ignore_current: false }).unwrap();
    assert_eq!(state.held, None);
}

#[test]
fn a_holder_is_preempted() {
    let mut state = three();
    state.apply(A, Request::Acquire { current: 10, kind: Kind::WriteExclusive }).unwrap();
    let kind = Kind::ExclusiveAccess;
    assert!(state.apply(B, Request::Preempt { current: 20, victim: 77, kind }).is_err());
    assert_eq!(state.apply(B, Request::Preempt { current: 20, victim: 0, kind }), Err(Status::INVALID_FIELD));
    let told = state.apply(B, Request::Preempt { current: 20, victim: 10, kind }).unwrap();
    assert!(told.contains(&(A, Notice::RegistrationPreempted)));
    assert_eq!(state.held, Some((kind, B)));
    assert_eq!(may(&state, A), (false, false));
    // It may come back as a registrant, which does not help it.
    state.apply(A, Request::Register { key: 10 }).unwrap();
    assert_eq!(may(&state, A), (false, false));
}

#[test]
fn a_registrant_is_preempted_without_touching_the_reservation() {
    let mut state = three();
    state.apply(A, Request::Acquire { current: 10, kind: Kind::WriteExclusiveRegistrants }).unwrap();
    let kind = Kind::ExclusiveAccess;
    let told = state.apply(B, Request::Preempt { current: 20, victim: 30, kind }).unwrap();
    assert_eq!(told, [(C, Notice::RegistrationPreempted)]);
    assert_eq!(state.held, Some((Kind::WriteExclusiveRegistrants, A)));
    assert_eq!(may(&state, C), (true, false));
}

#[test]
fn where_all_hold_it_the_key_0_is_everybody_else() {
    let mut state = three();
    state.apply(A, Request::Acquire { current: 10, kind: Kind::WriteExclusiveAll }).unwrap();
    state.apply(B, Request::Preempt { current: 20, victim: 0, kind: Kind::WriteExclusive }).unwrap();
    assert_eq!(state.registrants, [Registrant { host: B, key: 20 }]);
    assert_eq!(state.held, Some((Kind::WriteExclusive, B)));
}

#[test]
fn release_and_clear() {
    let mut state = three();
    let kind = Kind::ExclusiveAccessRegistrants;
    state.apply(A, Request::Acquire { current: 10, kind }).unwrap();
    // Not the holder: nothing happens, successfully.
    state.apply(B, Request::Release { current: 20, kind }).unwrap();
    assert!(state.held.is_some());
    assert_eq!(
        state.apply(A, Request::Release { current: 10, kind: Kind::WriteExclusive }),
        Err(Status::INVALID_FIELD)
    );
    let told = state.apply(A, Request::Release { current: 10, kind }).unwrap();
    assert_eq!(told.len(), 2);
    state.apply(A, Request::Acquire { current: 10, kind }).unwrap();
    let told = state.apply(C, Request::Clear { current: 30 }).unwrap();
    assert_eq!(told, [(A, Notice::RegistrationPreempted), (B, Notice::RegistrationPreempted)]);
    assert_eq!((state.held, state.registrants.len()), (None, 0));
}

#[test]
fn the_file_says_what_it_was_told() {
    let volume = VolumeId([5; 16]);
    let mut state = three();
    state.apply(B, Request::Acquire { current: 20, kind: Kind::ExclusiveAccess }).unwrap();
    let bytes = file::encode(&state, volume, [7; 16]);
    assert_eq!(file::decode(&bytes, volume), Ok((state.clone(), [7; 16])));
    crate::chunk::testing::golden("reservations-v1.bin", &bytes, true, |kept| {
        assert_eq!(file::decode(kept, volume), Ok((state.clone(), [7; 16])));
    });
    assert!(file::decode(&bytes, VolumeId([6; 16])).is_err());
    for at in 0..bytes.len() {
        let mut bad = bytes.clone();
        bad[at] ^= 1;
        assert!(file::decode(&bad, volume).is_err(), "byte {at}");
        assert!(file::decode(&bytes[..at], volume).is_err());
    }
}

#[test]
fn what_need_not_persist_is_gone_after_another_start_of_the_machine() {
    let dir = tempfile::tempdir().unwrap();
    let volume = VolumeId([5; 16]);
    assert_eq!(file::load(dir.path(), volume).unwrap(), Reservations::default());
    let mut state = three();
    file::store(dir.path(), volume, &state).unwrap();
    assert_eq!(file::load(dir.path(), volume).unwrap(), state, "a restart of the daemon is no loss of power");
    std::fs::write(dir.path().join(file::FILE), file::encode(&state, volume, [1; 16])).unwrap();
    assert_eq!(file::load(dir.path(), volume).unwrap().registrants, []);
    state.persists = true;
    std::fs::write(dir.path().join(file::FILE), file::encode(&state, volume, [1; 16])).unwrap();
    assert_eq!(file::load(dir.path(), volume).unwrap(), state);
}
