//! Many Services that change all the time, with questions asked all along.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use orlop_ebpf_common::{SlotKey, addr_to};
use orlop_ebpf_loader::{Dump, Maps, RealMaps};
use parking_lot::Mutex;

use super::*;

/// Endpoints of each Service.
const ENDPOINTS: u8 = 10;
/// Services that are asked, and servers of each.
const ASKED: usize = 16;
const SERVERS: usize = 12;
/// How late the last change may be seen, on whatever machine: this finds what never comes.
const LAG: Duration = Duration::from_secs(120);

/// A small generator whose numbers a seed repeats.
pub struct Random(pub u64);

impl Random {
    /// `ORLOP_TEST_SEED=N` repeats the numbers of a seed that was printed.
    pub fn new() -> Random {
        let seed = match std::env::var("ORLOP_TEST_SEED") {
            Ok(seed) => seed.parse().expect("ORLOP_TEST_SEED is a number"),
            Err(_) => {
                std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64
            }
        };
        println!("seed {seed}");
        Random(seed | 1)
    }

    /// Below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n
    }
}

/// The address of one of the many.
fn address(i: usize) -> String {
    format!("127.{}.{}.{}", 100 + i / 62_500, i / 250 % 250, i % 250 + 1)
}

fn many_slice(i: usize, generation: u8, count: u8) -> (serde_json::Value, BTreeSet<IpAddr>) {
    let ips: BTreeSet<IpAddr> = (0..count)
        .map(|e| IpAddr::from([10, e.wrapping_add(generation) % 40, (i / 250) as u8, (i % 250 + 1) as u8]))
        .collect();
    let endpoints: Vec<_> = ips
        .iter()
        .map(|ip| {
            json!({
                "addresses": [ip.to_string()], "conditions": {"ready": true, "serving": true, "terminating": false},
                "nodeName": "elsewhere", "targetRef": {"kind": "Pod", "namespace": "n", "name": format!("s{i}-{ip}"),
                "uid": "2c6a9dc2-5a4e-4d5c-9e71-0c8b3d3f7a01"},
            })
        })
        .collect();
    let mut slice = slice(&format!("s{i}"), 80);
    slice["endpoints"] = json!(endpoints);
    (slice, ips)
}

/// What the maps must say: endpoints by Service address.
type Truth = HashMap<IpAddr, BTreeSet<IpAddr>>;

fn fill(api: &FakeApi, services: usize) -> Truth {
    let mut truth = Truth::new();
    for i in 0..services {
        let (slice, ips) = many_slice(i, 0, ENDPOINTS);
        api.put("services", service(&format!("s{i}"), &address(i), json!({})));
        api.put("endpointslices", slice);
        truth.insert(address(i).parse().unwrap(), ips);
    }
    truth
}

fn read(place: &Place) -> Dump {
    RealMaps::open(&place.config.datapath.pins).unwrap().dump().unwrap()
}

fn said(dump: &Dump) -> Option<Truth> {
    let backends = |set, count| -> Option<BTreeSet<IpAddr>> {
        (0..count)
            .map(|slot| Some(addr_to(&dump.backends.get(dump.slots.get(&SlotKey { set, slot })?)?.addr)))
            .collect()
    };
    let fronts = dump.frontends.iter().filter(|(k, _)| !k.is_rest());
    fronts.map(|(k, v)| Some((addr_to(&k.addr), backends(v.set, v.count)?))).collect()
}

/// How the maps differ from what they must say, when they do.
fn difference(have: &Option<Truth>, want: &Truth) -> Option<String> {
    let Some(have) = have else { return Some("a frontend leads to backends that are not there".into()) };
    let keys: BTreeSet<_> = have.keys().chain(want.keys()).collect();
    let wrong: Vec<_> = keys.into_iter().filter(|k| have.get(k) != want.get(k)).collect();
    let first = wrong.first()?;
    Some(format!(
        "{} of {} differ; {first} leads to {:?}, not {:?}",
        wrong.len(),
        want.len(),
        have.get(first),
        want.get(first)
    ))
}

fn roomy(api: &FakeApi) -> Place {
    let mut place = Place::new(api.address);
    place.config.datapath.sizes = Sizes {
        frontends: 65_536,
        slots: 262_144,
        backends: 262_144,
        connections: 256,
        sockets: 4096,
        ..Sizes::default()
    };
    place
}

/// Changes of endpoints, of Services' settings, Services that come and go.
fn change(api: &FakeApi, i: usize, random: &mut Random, truth: &mut Truth) {
    let (name, at): (_, IpAddr) = (format!("s{i}"), address(i).parse().unwrap());
    match random.below(8) {
        0 if truth.remove(&at).is_some() => {
            api.delete("services", &name);
            api.delete("endpointslices", &format!("{name}-1"));
        }
        1 if truth.contains_key(&at) => {
            let affinity = ["None", "ClientIP"][random.below(2)];
            api.put("services", service(&name, &address(i), json!({"sessionAffinity": affinity})));
        }
        _ => {
            let (slice, ips) =
                many_slice(i, random.below(40) as u8, random.below(usize::from(ENDPOINTS) + 1) as u8);
            if truth.insert(at, ips).is_none() {
                api.put("services", service(&name, &address(i), json!({})));
            }
            api.put("endpointslices", slice);
        }
    }
}

/// Services whose endpoints are servers of this test. Each has addresses of its own, so an answer says for whom it is. Of the first
/// half one endpoint is ready at a time, each for a generation; of the others any number, at random.
struct Asked {
    port: u16,
    /// By Service: the last generation that was written, or the endpoints that are ready as bits.
    written: Vec<Mutex<usize>>,
    /// By Service: the last generation that was seen.
    seen: Vec<Mutex<usize>>,
}

impl Asked {
    fn new(port: u16) -> Asked {
        let of = |n| (0..ASKED).map(|_| Mutex::new(n)).collect();
        Asked { port, written: of(1), seen: of(1) }
    }

    fn address(i: usize) -> String {
        format!("127.97.0.{}", i + 1)
    }

    fn server(i: usize, n: usize) -> IpAddr {
        IpAddr::from([127, 64, i as u8, n as u8 + 1])
    }

    fn has_generations(i: usize) -> bool {
        i < ASKED / 2
    }

    /// Which servers are ready: those of a generation, or of so many bits.
    fn ready_of(i: usize, written: usize) -> BTreeSet<IpAddr> {
        let is_ready = |n: &usize| {
            if Asked::has_generations(i) { written % SERVERS == *n } else { written & (1 << n) != 0 }
        };
        (0..SERVERS).filter(is_ready).map(|n| Asked::server(i, n)).collect()
    }

    fn ready(&self, i: usize) -> BTreeSet<IpAddr> {
        Asked::ready_of(i, *self.written[i].lock())
    }

    /// Writes the next state of a Service's endpoints.
    fn put(&self, api: &FakeApi, i: usize, random: Option<&mut Random>) {
        let mut written = self.written[i].lock();
        match random {
            None => {}
            Some(_) if Asked::has_generations(i) => *written += 1,
            Some(random) => *written = 1 + random.below((1 << SERVERS) - 1),
        }
        let ready = Asked::ready_of(i, *written);
        let mut s = slice(&format!("p{i}"), self.port);
        // Who is not ready any more ends its connections first, as pods do.
        let endpoints = (0..SERVERS).map(|n| Asked::server(i, n)).map(|ip| {
            let ready = ready.contains(&ip);
            json!({"addresses": [ip.to_string()], "conditions": {"ready": ready, "serving": true, "terminating": !ready}})
        });
        s["endpoints"] = json!(endpoints.collect::<Vec<_>>());
        api.put("endpointslices", s);
    }

    /// Asks once. The answer must be one of the Service's own servers, and of a generation from the last one that was seen to the last
    /// one that was written: however late the proxy is, it never goes back.
    fn ask(&self, i: usize) {
        let seen = *self.seen[i].lock();
        let answer = ask(&format!("{}:80", Asked::address(i))).unwrap_or_else(|e| panic!("p{i}: {e}"));
        let server: IpAddr = answer.parse().unwrap();
        let n = (0..SERVERS).find(|n| Asked::server(i, *n) == server);
        let n = n.unwrap_or_else(|| panic!("p{i} answered by {server}, which is another's"));
        if Asked::has_generations(i) {
            let generation = seen + (SERVERS + n - seen % SERVERS) % SERVERS;
            let written = *self.written[i].lock();
            assert!(generation <= written, "p{i} answered by {n} after {seen}, until {written}");
            let mut seen = self.seen[i].lock();
            *seen = generation.max(*seen);
        }
    }
}

/// Says by which address it was reached; returns its port.
fn servers() -> u16 {
    let l = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = l.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for mut s in l.incoming().flatten() {
            let _ = s.local_addr().and_then(|at| s.write_all(at.ip().to_string().as_bytes()));
        }
    });
    port
}

/// A thousand changes each second among `services`, for `time`.
async fn churn(services: usize, time: Duration) {
    let _alone = ALONE.lock().await;
    let api = FakeApi::start().await;
    let mut truth = fill(&api, services);
    let asked = Arc::new(Asked::new(servers()));
    for i in 0..ASKED {
        api.put("services", service(&format!("p{i}"), &Asked::address(i), json!({})));
        asked.put(&api, i, None);
    }
    let place = roomy(&api);
    let proxy = start(&place.config).await;

    let (over, questions) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let askers: Vec<_> = (0..2)
        .map(|n| {
            let (asked, over, questions) = (asked.clone(), over.clone(), questions.clone());
            std::thread::spawn(move || {
                let mut i = n;
                while !over.load(Ordering::Relaxed) {
                    asked.ask(i % ASKED);
                    questions.fetch_add(1, Ordering::Relaxed);
                    i += 1;
                }
            })
        })
        .collect();
    let mut random = Random::new();
    let mut tick = tokio::time::interval(Duration::from_millis(1));
    let (begin, mut changes) = (Instant::now(), 0);
    while begin.elapsed() < time && !askers.iter().any(|a| a.is_finished()) {
        tick.tick().await;
        changes += 1;
        if random.below(4) == 0 {
            asked.put(&api, random.below(ASKED), Some(&mut random));
        } else {
            change(&api, random.below(services), &mut random, &mut truth);
        }
    }
    let took = begin.elapsed();
    over.store(true, Ordering::Relaxed);
    askers.into_iter().for_each(|a| a.join().unwrap());
    for i in 0..ASKED {
        truth.insert(Asked::address(i).parse().unwrap(), asked.ready(i));
    }
    let settled = Instant::now();
    while let Some(differs) = difference(&said(&read(&place)), &truth) {
        assert!(settled.elapsed() < LAG, "{differs}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    println!(
        "{services} services: {changes} changes in {took:?}, {} questions, in step {:?} later",
        questions.load(Ordering::Relaxed),
        begin.elapsed() - took
    );
    assert!(questions.load(Ordering::Relaxed) > ASKED, "every Service was asked");
    end(proxy).await;
}

/// `ORLOP_TEST_CHURN=1000,5` makes it smaller: so many Services, for so many seconds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_are_right_while_everything_changes() {
    let asked = std::env::var("ORLOP_TEST_CHURN").unwrap_or_else(|_| "10000,60".into());
    let (services, seconds) = asked.split_once(',').expect("ORLOP_TEST_CHURN=SERVICES,SECONDS");
    churn(services.parse().unwrap(), Duration::from_secs(seconds.parse().unwrap())).await;
}

/// From an empty kernel to all Services, then new ones beside them; returns the time of the first, and the median of the
/// others, from the API server's event to the first answered connection.
async fn at_scale(services: usize) -> (Duration, Duration) {
    let _alone = ALONE.lock().await;
    let api = FakeApi::start().await;
    let truth = fill(&api, services);
    let place = roomy(&api);
    let begin = Instant::now();
    let proxy = start(&place.config).await;
    let full = begin.elapsed();
    assert!(said(&read(&place)).unwrap() == truth, "the maps do not say what the API says");
    let a = server("a", SocketAddr::from(([127, 0, 0, 1], 0)));
    let mut times = Vec::new();
    for i in 0..20 {
        let (name, ip) = (format!("t{i}"), format!("127.96.2.{}", i + 1));
        api.put("endpointslices", slice(&name, a.port()));
        tokio::time::sleep(Duration::from_millis(5)).await;
        let begin = Instant::now();
        api.put("services", service(&name, &ip, json!({})));
        while ask(&format!("{ip}:80")).is_err() {
            tokio::time::sleep(Duration::from_micros(100)).await;
        }
        times.push(begin.elapsed());
    }
    times.sort();
    end(proxy).await;
    (full, times[times.len() / 2])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_services_are_complete() {
    let (full, one) = at_scale(1000).await;
    println!("1000 services: full sync {full:?}, one new {one:?}");
}
