//! What two CPUs do at the same moment. Packets of a connection's two directions: each notes something in the entry of the
//! answers, and neither may undo what the other has noted. First packets of two connections: one source port is for one.

#[allow(dead_code)]
mod place;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use aya::maps::{Array, HashMap, Map, MapData};
use aya::programs::{SchedClassifier, TestRun, TestRunOptions, loaded_programs};
use nix::sched::{CloneFlags, CpuSet, sched_getaffinity, sched_setaffinity, unshare};
use nix::unistd::Pid;
use orlop_ebpf_common::*;
use orlop_ebpf_loader::{Datapath, Maps, Op};
use place::Place;

const NODE: [u8; 4] = [10, 98, 1, 1];
const CLIENT: [u8; 4] = [10, 98, 1, 2];
const POD: [u8; 4] = [10, 98, 2, 2];
const NODE_PORT: u16 = 30_080;
const BACKEND_PORT: u16 = 8080;
const CLIENT_PORT: u16 = 40_000;
/// The loopback interface of every namespace, which test runs come in by.
const LO: u32 = 1;

const SYN: u8 = 2;
const FIN_ACK: u8 = 17;

/// A change that is a reading and a writing loses something once in some thousands of them.
const ROUNDS: usize = 100_000;
/// Two CPUs that others keep busy meet seldom; then fewer must do.
const TIME: Duration = Duration::from_secs(8);

fn addr(a: [u8; 4]) -> Addr {
    addr_from(a.into())
}

/// A TCP segment without data in a frame.
fn frame(from: ([u8; 4], u16), to: ([u8; 4], u16), tcp_flags: u8) -> Vec<u8> {
    let mut f = vec![0; 54];
    (f[12], f[13]) = (0x08, 0x00);
    (f[14], f[17], f[22], f[23]) = (0x45, 40, 64, TCP);
    f[26..30].copy_from_slice(&from.0);
    f[30..34].copy_from_slice(&to.0);
    f[34..36].copy_from_slice(&from.1.to_be_bytes());
    f[36..38].copy_from_slice(&to.1.to_be_bytes());
    (f[46], f[47]) = (0x50, tcp_flags);
    f
}

/// A program of ours: others on this machine may run the same.
fn program(name: &'static str, map: u32) -> SchedClassifier {
    let ours = loaded_programs().flatten().find(|p| {
        p.name_as_str() == Some(name)
            && p.map_ids().is_ok_and(|ids| ids.is_some_and(|ids| ids.contains(&map)))
    });
    SchedClassifier::from_program_info(ours.expect("it is loaded"), name.into()).unwrap()
}

fn run(program: &SchedClassifier, frame: &[u8]) {
    program.test_run(TestRunOptions { data_in: Some(frame), ..TestRunOptions::new() }).unwrap();
}

/// Lets two threads go on together, without sleeping as long as both run.
fn meet(arrived: &AtomicUsize, meeting: usize) {
    arrived.fetch_add(1, Ordering::AcqRel);
    let mut spins = 0u32;
    while arrived.load(Ordering::Acquire) < (meeting + 1) * 2 {
        spins += 1;
        if spins.is_multiple_of(1024) {
            thread::yield_now();
        }
        std::hint::spin_loop();
    }
}

/// One way through the programs is longer than the other: all differences have their turn.
fn wait(turns: usize) {
    for i in 0..turns {
        std::hint::black_box(i);
    }
}

fn stay_on(cpu: usize) {
    let mut only = CpuSet::new();
    only.set(cpu).unwrap();
    sched_setaffinity(Pid::from_raw(0), &only).unwrap();
}

#[test]
fn no_cpu_undoes_what_another_notes() {
    with_node_port("fl", TCP, |_, connections| race(connections));
}

#[test]
fn no_two_cpus_take_one_source_port() {
    with_node_port("fp", UDP, one_port);
}

/// Runs `f` in a network namespace of its own where the programs serve a node port.
fn with_node_port(prefix: &str, proto: u8, f: fn(&Path, MapData)) {
    let place = Place::new(prefix);
    let config = place.config();
    thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("run as root");
        let mut dp = Datapath::open(&config).unwrap();
        let uplink = Uplink { addr4: addr(NODE), l3_offset: 14, ..Uplink::default() };
        dp.attach_uplink(LO, "lo", uplink).unwrap();
        let backend = Backend { addr: addr(POD), port: BACKEND_PORT, proto, flags: backend_flags::LOCAL };
        let front = FrontendKey { addr: any_addr(true), port: NODE_PORT, proto, scope: SCOPE_EXTERNAL };
        for op in [
            Op::PutLocal(addr(NODE), local_flags::NODE_PORT),
            Op::PutBackend(1, backend),
            Op::PutSlot(SlotKey { set: 1, slot: 0 }, 1),
            Op::PutFrontend(
                front,
                FrontendValue { set: 1, count: 1, service: 1, ..FrontendValue::default() },
            ),
        ] {
            dp.maps.apply(&op).unwrap();
        }
        let maps = config.pins.join(format!("v{LAYOUT}"));
        let table = if proto == UDP { "DATAGRAMS" } else { "CONNECTIONS" };
        f(&maps, MapData::from_pin(maps.join(table)).unwrap());
    })
    .join()
    .unwrap();
}

fn two_cpus() -> Vec<usize> {
    let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap();
    (0..CpuSet::count()).filter(|c| allowed.is_set(*c).unwrap_or(false)).take(2).collect()
}

/// A datagram without data in a frame.
fn datagram(from: ([u8; 4], u16), to: ([u8; 4], u16)) -> Vec<u8> {
    let mut f = frame(from, to, 0);
    f.truncate(42);
    (f[17], f[23], f[39]) = (28, UDP, 8);
    f
}

/// Two flows of a pod to itself, which need a source port each, where there is one alone and that one is of a flow which is over.
fn one_port(maps: &Path, connections: MapData) {
    const PORT: u16 = 61_000;
    let map = connections.info().unwrap().id();
    let mut connections: HashMap<_, CtKey, CtValue> =
        HashMap::try_from(Map::LruHashMap(connections)).unwrap();
    let config = Map::Array(MapData::from_pin(maps.join("CONFIG")).unwrap());
    let mut config: Array<_, Config> = Array::try_from(config).unwrap();
    let set = Config { snat_first: PORT, snat_last: PORT, ..config.get(&0, 0).unwrap() };
    config.set(0, set, 0).unwrap();
    let (node, pod) = (addr(NODE), addr(POD));
    let answers = CtKey {
        src: pod,
        dst: node,
        sport: BACKEND_PORT,
        dport: PORT,
        proto: UDP,
        dir: ct_dir::REPLY,
        pad: 0,
    };
    let flows = [CLIENT_PORT, CLIENT_PORT + 1].map(|sport| CtKey {
        src: pod,
        dst: node,
        sport,
        dport: NODE_PORT,
        proto: UDP,
        dir: ct_dir::FORWARD,
        pad: 0,
    });
    // Times begin when the machine does: what was never seen is over some minutes later.
    let up = || nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap().tv_sec();
    while up() < 200 {
        thread::sleep(Duration::from_secs(1));
    }
    let cpus = two_cpus();
    let arrived = Arc::new(AtomicUsize::new(0));
    let over = Arc::new(AtomicUsize::new(ROUNDS));
    let [first, second] = flows.map(|k| datagram((POD, k.sport), (NODE, NODE_PORT)));
    let other = {
        let (arrived, over, cpu) = (arrived.clone(), over.clone(), cpus[cpus.len() - 1]);
        thread::spawn(move || {
            let ingress = program("lb_ingress", map);
            stay_on(cpu);
            let mut round = 0;
            while round < over.load(Ordering::Acquire) {
                meet(&arrived, round * 2);
                wait(round * 7 % 512);
                run(&ingress, &second);
                meet(&arrived, round * 2 + 1);
                round += 1;
            }
        })
    };
    let ingress = program("lb_ingress", map);
    stay_on(cpus[0]);
    let (begin, mut shared, mut done) = (Instant::now(), 0, 0);
    while done < over.load(Ordering::Acquire) {
        connections.insert(answers, CtValue::default(), 0).unwrap();
        flows.iter().for_each(|k| drop(connections.remove(k)));
        if begin.elapsed() > TIME {
            over.store(done + 1, Ordering::Release);
        }
        meet(&arrived, done * 2);
        run(&ingress, &first);
        meet(&arrived, done * 2 + 1);
        let taken = flows.iter().filter(|k| connections.get(k, 0).is_ok()).count();
        assert!(taken > 0, "round {done}: nobody has it");
        shared += taken - 1;
        done += 1;
    }
    other.join().unwrap();
    println!("{done} rounds, {shared} with two owners of one port");
    assert_eq!(shared, 0, "of {done} rounds");
}

fn race(connections: MapData) {
    let map = connections.info().unwrap().id();
    let mut connections: HashMap<_, CtKey, CtValue> =
        HashMap::try_from(Map::LruHashMap(connections)).unwrap();
    let (ingress, egress) = (program("lb_ingress", map), program("lb_egress", map));
    run(&ingress, &frame((CLIENT, CLIENT_PORT), (NODE, NODE_PORT), SYN));
    let answers = CtKey {
        src: addr(POD),
        dst: addr(CLIENT),
        sport: BACKEND_PORT,
        dport: CLIENT_PORT,
        proto: TCP,
        dir: ct_dir::REPLY,
        pad: 0,
    };
    let begun = connections.get(&answers, 0).expect("the client's first packet makes an entry for answers");
    const NEW: u32 = ct_flags::NEW | ct_flags::FAR_NEW;
    const ENDED: u32 = ct_flags::CLOSING | ct_flags::FAR_CLOSING;
    assert_eq!(begun.flags & (NEW | ENDED), NEW);

    let cpus = two_cpus();
    let arrived = Arc::new(AtomicUsize::new(0));
    let over = Arc::new(AtomicUsize::new(ROUNDS));
    let ends = [
        (ingress, frame((CLIENT, CLIENT_PORT), (NODE, NODE_PORT), FIN_ACK)),
        (egress, frame((POD, BACKEND_PORT), (CLIENT, CLIENT_PORT), FIN_ACK)),
    ];
    // One after the other, to see that both do note something.
    for (program, frame) in &ends {
        run(program, frame);
    }
    assert_eq!(connections.get(&answers, 0).unwrap().flags & (NEW | ENDED), ENDED);

    let [(ingress, from_client), (egress, from_pod)] = ends;
    let other = {
        let (arrived, over, cpu) = (arrived.clone(), over.clone(), cpus[cpus.len() - 1]);
        thread::spawn(move || {
            stay_on(cpu);
            let mut round = 0;
            while round < over.load(Ordering::Acquire) {
                meet(&arrived, round * 2);
                wait(round * 7 % 512);
                run(&egress, &from_pod);
                meet(&arrived, round * 2 + 1);
                round += 1;
            }
        })
    };
    stay_on(cpus[0]);
    let (begin, mut lost, mut done) = (Instant::now(), 0, 0);
    while done < over.load(Ordering::Acquire) {
        connections.insert(answers, begun, 0).unwrap();
        if begin.elapsed() > TIME {
            over.store(done + 1, Ordering::Release);
        }
        meet(&arrived, done * 2);
        run(&ingress, &from_client);
        meet(&arrived, done * 2 + 1);
        let flags = connections.get(&answers, 0).unwrap().flags;
        lost += usize::from(flags & (NEW | ENDED) != ENDED);
        done += 1;
    }
    other.join().unwrap();
    println!("{done} rounds, {lost} with something undone");
    assert_eq!(lost, 0, "of {done} rounds");
}
