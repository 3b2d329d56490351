use super::*;
use crate::desired::{Selection, desired, range};
use crate::model::{Endpoint as Ep, Hint, Hints, Model, Port, Service, Slice, SlicePort};
use foldhash::HashMapExt;
use orlop_ebpf_common::{SCOPE_EXTERNAL, TCP, UDP, addr_from};
use orlop_ebpf_loader::maps::{FakeMaps, FaultyMaps};
use proptest::prelude::*;

fn ip(s: &str) -> IpAddr {
    s.parse().unwrap()
}

fn service(n: u8) -> Service {
    Service {
        cluster_ips: vec![IpAddr::from([10, 96, 0, n])],
        ports: vec![Port { name: "p".into(), proto: TCP, port: 80, node_port: 30000 + u16::from(n) }],
        ..Service::default()
    }
}

fn slice(service: &str, backends: &[u8]) -> Slice {
    Slice {
        service: service.into(),
        v4: true,
        ports: vec![
            SlicePort { name: "p".into(), proto: TCP, port: 8080 },
            SlicePort { name: "u".into(), proto: UDP, port: 5353 },
        ],
        endpoints: backends
            .iter()
            .map(|b| Ep {
                ip: IpAddr::from([10, 244, 0, *b]),
                ready: true,
                serving: true,
                terminating: false,
                local: b % 2 == 0,
                hints: Hints::default(),
            })
            .collect(),
    }
}

/// The maps, read as the programs read them: frontend to (backends, flags).
fn resolve(d: &Dump) -> HashMap<FrontendKey, (Vec<Endpoint>, u32, u32)> {
    d.frontends
        .iter()
        .map(|(k, v)| {
            let mut to: Vec<Endpoint> = (0..v.count)
                .map(|slot| {
                    let id = d.slots[&SlotKey { set: v.set, slot }];
                    let b = d.backends[&id];
                    (b.addr, b.port, b.proto)
                })
                .collect();
            to.sort_unstable();
            (*k, (to, v.flags, v.affinity_seconds))
        })
        .collect()
}

/// The same from the model. Contested frontends go to whoever has them, so they are left out.
fn expected(m: &Model) -> HashMap<FrontendKey, (Vec<Endpoint>, u32, u32)> {
    let mut out = HashMap::new();
    for (name, _) in m.services() {
        let d = desired(m, name, Selection::Maglev);
        for f in &d.frontends {
            let set = &d.sets[f.set];
            let mut to: Vec<Endpoint> = set.backends.iter().map(|b| (b.addr, b.port, b.proto)).collect();
            to.sort_unstable();
            let flags = [
                (d.affinity_seconds > 0, frontend_flags::AFFINITY),
                (f.hidden, frontend_flags::DROP_WHEN_EMPTY),
                (set.maglev, frontend_flags::MAGLEV),
                (true, frontend_flags::MEMBERS),
                (f.ranged, frontend_flags::RANGES),
                (
                    f.ranged && d.node_admitted[usize::from(!is_v4(&f.key.addr))],
                    frontend_flags::NODE_ADMITTED,
                ),
            ];
            let flags = flags.iter().filter(|(on, _)| *on).map(|(_, f)| f).sum();
            out.insert(f.key, (to, flags, d.affinity_seconds));
        }
    }
    out
}

/// Nothing in the maps that no frontend leads to.
fn no_garbage(d: &Dump) {
    let sets: HashMap<u32, u32> = d.frontends.values().map(|v| (v.set, v.count)).collect();
    for k in d.slots.keys() {
        assert!(k.slot < sets[&k.set], "stray slot {k:?}");
    }
    let used: HashSet<u32> = d.slots.values().copied().collect();
    assert_eq!(used, d.backends.keys().copied().collect::<HashSet<_>>(), "stray backends");
    let members: HashSet<(u32, u32)> = d.members.keys().map(|k| (k.set, k.slot)).collect();
    let in_slots: HashSet<(u32, u32)> = d.slots.iter().map(|(k, id)| (k.set, *id)).collect();
    assert_eq!(members, in_slots, "who is in a set is listed as its member");
    for set in &d.maglev {
        assert!(sets.contains_key(set), "stray table");
    }
    let numbers: HashSet<u32> = d.frontends.values().map(|v| v.service).collect();
    assert_eq!(numbers, d.services.keys().copied().collect::<HashSet<_>>(), "names are those of frontends");
    let ranged = d.frontends.values().filter(|v| v.flags & frontend_flags::RANGES != 0);
    let ranged: HashSet<u32> = ranged.map(|v| v.service).collect();
    assert_eq!(
        ranged,
        d.ranges.iter().map(|r| r.0.service).filter(|n| *n != SERVICE_RANGE).collect::<HashSet<_>>(),
        "ranges are those of frontends"
    );
}

fn sync_all(t: &mut Tables, maps: &mut dyn Maps, m: &mut Model) -> bool {
    let mut clean = true;
    for name in m.take_dirty() {
        let d = desired(m, &name, Selection::Maglev);
        match t.sync(maps, &name, &d) {
            Ok(o) => o.retry.into_iter().for_each(|n| m.mark(n)),
            Err(_) => {
                m.mark(name);
                clean = false;
            }
        }
    }
    clean && m.is_clean()
}

#[test]
fn a_sync_touches_only_what_changed() {
    let (mut t, mut maps, mut m) = (Tables::default(), FakeMaps::default(), Model::default());
    for n in 1..=20 {
        m.set_service(
            &format!("n/s{n}"),
            Some(Service { ports: vec![Port { node_port: 0, ..service(n).ports[0].clone() }], ..service(n) }),
        );
        m.set_slice(&format!("n/s{n}-x"), Some(slice(&format!("n/s{n}"), &[n, n + 100])));
    }
    assert!(sync_all(&mut t, &mut maps, &mut m));
    no_garbage(&maps.content);
    let before = maps.writes;
    m.set_slice("n/s3-x", Some(slice("n/s3", &[3, 103, 200])));
    assert!(sync_all(&mut t, &mut maps, &mut m));
    assert_eq!(maps.writes - before, 4, "one backend, one member, one slot, one frontend");
    let before = maps.writes;
    m.set_slice("n/s3-x", Some(slice("n/s3", &[103, 200])));
    assert!(sync_all(&mut t, &mut maps, &mut m));
    assert_eq!(maps.writes - before, 5, "slot moved, frontend, last slot, member, backend");
    m.set_slice("n/s3-x", Some(slice("n/s3", &[103, 200])));
    assert!(m.is_clean(), "an unchanged object changes nothing");
}

#[test]
fn a_contested_frontend_moves_on_when_its_owner_goes() {
    let (mut t, mut maps, mut m) = (Tables::default(), FakeMaps::default(), Model::default());
    let shared = ip("192.0.2.1");
    for n in 1..=2 {
        m.set_service(&format!("n/s{n}"), Some(Service { external_ips: vec![shared], ..service(n) }));
        m.set_slice(&format!("n/s{n}-x"), Some(slice(&format!("n/s{n}"), &[n])));
        assert!(sync_all(&mut t, &mut maps, &mut m));
    }
    let key = FrontendKey { addr: addr_from(shared), port: 80, proto: TCP, scope: SCOPE_EXTERNAL };
    assert_eq!(resolve(&maps.content)[&key].0[0].0, addr_from(ip("10.244.0.1")));
    m.set_service("n/s1", None);
    assert!(!sync_all(&mut t, &mut maps, &mut m));
    assert!(sync_all(&mut t, &mut maps, &mut m));
    assert_eq!(resolve(&maps.content)[&key].0[0].0, addr_from(ip("10.244.0.2")));
}

#[test]
fn a_restart_without_changes_writes_nothing() {
    let (mut t, mut maps, mut m) = (Tables::default(), FakeMaps::default(), Model::default());
    for n in 1..=5 {
        let affinity_seconds = if n == 2 { 10800 } else { 0 };
        m.set_service(
            &format!("n/s{n}"),
            Some(Service { affinity_seconds, external_local: n == 3, ..service(n) }),
        );
        m.set_slice(&format!("n/s{n}-x"), Some(slice(&format!("n/s{n}"), &[n, 50, 51])));
    }
    assert!(sync_all(&mut t, &mut maps, &mut m));
    let before = maps.content.clone();
    let mut t = Tables::adopt(maps.dump().unwrap());
    let (names, _) = m.names();
    names.into_iter().for_each(|n| m.mark(n));
    maps.writes = 0;
    assert!(sync_all(&mut t, &mut maps, &mut m));
    t.drop_orphans(&mut maps).unwrap();
    // Tables of backends are the same but are not read back, so each is written once.
    assert_eq!(maps.writes, before.maglev.len());
    maps.content.maglev.sort_unstable();
    let mut before = before;
    before.maglev.sort_unstable();
    assert_eq!(maps.content, before);
}

#[derive(Clone, Debug)]
enum Step {
    Service(u8, Option<(bool, bool, bool, bool)>),
    /// Endpoints by address, each with its condition and for whom it is.
    Slice(u8, u8, Option<Vec<(u8, Condition, Hints)>>),
    /// The node's addresses by which others know it.
    NodeIps(Vec<u8>),
    /// All of its addresses; node ports answer on some.
    Locals(Vec<(u8, bool)>),
    /// Addresses that are Services' alone.
    Ranges(Vec<u8>),
    Restart,
}

/// Ready, serving, terminating.
type Condition = (bool, bool, bool);

fn hints() -> impl Strategy<Value = Hints> {
    let hint = || prop::sample::select(vec![Hint::None, Hint::Ours, Hint::Ours, Hint::Others]);
    (hint(), hint()).prop_map(|(node, zone)| Hints { node, zone })
}

fn endpoint() -> impl Strategy<Value = (u8, Condition, Hints)> {
    let condition = prop::sample::select(vec![
        (true, true, false),
        (true, true, false),
        (false, true, true),
        (false, false, true),
    ]);
    // Most Services have no hints at all.
    (1..12u8, condition, prop_oneof![Just(Hints::default()), hints()])
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (1..6u8, prop::option::weighted(0.8, any::<(bool, bool, bool, bool)>()))
            .prop_map(|(n, s)| Step::Service(n, s)),
        6 => (1..6u8, 0..2u8, prop::option::weighted(0.8, prop::collection::vec(endpoint(), 0..6)))
            .prop_map(|(n, i, s)| Step::Slice(n, i, s)),
        1 => prop::collection::vec(1..6u8, 0..3).prop_map(Step::NodeIps),
        1 => prop::collection::vec((1..6u8, any::<bool>()), 0..4).prop_map(Step::Locals),
        1 => prop::collection::vec(1..6u8, 0..3).prop_map(Step::Ranges),
        1 => Just(Step::Restart),
    ];
    prop::collection::vec(step, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any changes, restarts and failing writes: in the end the maps say what the model says, and nothing else.
    #[test]
    fn maps_follow_the_model(steps in steps(), faults in prop::collection::vec(0..400usize, 0..20)) {
        let mut m = Model::default();
        let mut t = Tables::default();
        let fails = move |n: usize| faults.contains(&n);
        let (mut locals, mut ranges) = (StdMap::new(), Vec::new());
        let mut maps = FaultyMaps { inner: FakeMaps::default(), fails, seen: 0 };
        for step in steps {
            match step {
                Step::Service(n, s) => {
                    let s = s.map(|(affinity, internal, external, udp)| {
                        let mut s = service(n);
                        s.affinity_seconds = if affinity { 60 } else { 0 };
                        s.internal_local = internal;
                        s.external_local = external;
                        if internal && affinity {
                            s.load_balancer_ips = vec![IpAddr::from([192, 0, 2, n])];
                            s.source_ranges = vec![format!("10.{n}.0.0/16").parse().unwrap()];
                        }
                        if udp {
                            s.ports.push(Port { name: "u".into(), proto: UDP, port: 53, node_port: 0 });
                        }
                        s
                    });
                    m.set_service(&format!("n/s{n}"), s);
                }
                Step::Slice(n, i, s) => {
                    let name = format!("n/s{n}");
                    let s = s.map(|all| {
                        let mut s = slice(&name, &all.iter().map(|e| e.0).collect::<Vec<_>>());
                        for (e, (_, condition, hints)) in s.endpoints.iter_mut().zip(all) {
                            (e.ready, e.serving, e.terminating) = condition;
                            e.hints = hints;
                        }
                        s
                    });
                    m.set_slice(&format!("{name}-{i}"), s);
                }
                Step::NodeIps(all) => m.set_node_ips(all.iter().map(|n| IpAddr::from([10, *n, 0, 1])).collect()),
                Step::Locals(all) => {
                    let at = |n| addr_from(IpAddr::from([10, n, 0, 1]));
                    locals = all.into_iter().map(|(n, serves)| (at(n), u32::from(serves))).collect();
                    // One that fails is done again with the next change.
                    let _ = t.sync_locals(&mut maps, &locals);
                }
                Step::Ranges(all) => {
                    ranges = all.iter().map(|n| range(&format!("10.{n}.0.0/16").parse().unwrap())).collect();
                    let _ = t.sync_service_range(&mut maps, &ranges);
                }
                Step::Restart => {
                    t = Tables::adopt(maps.dump().unwrap());
                    let (names, _) = m.names();
                    names.into_iter().for_each(|n| m.mark(n));
                    sync_all(&mut t, &mut maps, &mut m);
                    // Only when all are known to be in: a failed service may not have claimed its entries.
                    while !m.is_clean() {
                        sync_all(&mut t, &mut maps, &mut m);
                    }
                    while t.drop_orphans(&mut maps).is_err() {}
                }
            }
            sync_all(&mut t, &mut maps, &mut m);
            // At any moment every frontend leads to backends that exist.
            resolve(&maps.inner.content);
        }
        while !sync_all(&mut t, &mut maps, &mut m) {}
        while t.sync_locals(&mut maps, &locals).is_err() {}
        while t.sync_service_range(&mut maps, &ranges).is_err() {}
        prop_assert_eq!(&maps.inner.content.locals, &locals);
        let reserved = maps.inner.content.ranges.iter().filter(|(k, _)| k.service == SERVICE_RANGE);
        prop_assert_eq!(reserved.copied().collect::<HashSet<_>>(), ranges.into_iter().collect::<HashSet<_>>());
        prop_assert_eq!(resolve(&maps.inner.content), expected(&m));
        no_garbage(&maps.inner.content);
    }
}
