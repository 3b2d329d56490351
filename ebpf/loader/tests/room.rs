//! How much the maps hold.

mod place;

use orlop_ebpf_common::maglev;
use orlop_ebpf_loader::{Datapath, Maps, Op, purge};
use place::Place;

fn table(set: u32) -> Op {
    Op::PutMaglev(set, Box::new([1; maglev::SIZE]))
}

/// Maglev tables go by the number of frontends, also where a smaller map was left: it is made anew, as all of it is written at
/// every start.
#[test]
fn maglev_tables_are_as_many_as_frontends() {
    let place = Place::new("rm");
    let mut config = place.config();
    config.sizes.frontends = 16;
    let (mut small, _) = Datapath::prepare(&config).unwrap();
    (0..16).for_each(|set| small.maps.apply(&table(set)).unwrap());
    let full = small.maps.apply(&table(16)).unwrap_err().to_string();
    assert!(full.contains("MAGLEV is full") && full.contains("--map-size frontends="), "{full}");
    drop(small);

    config.sizes.frontends = 5000;
    let (mut large, _) = Datapath::prepare(&config).unwrap();
    assert_eq!(large.maps.dump().unwrap().maglev, [0; 0]);
    (0..5000).for_each(|set| large.maps.apply(&table(set)).unwrap());
    drop(large);

    config.sizes.frontends = 16;
    let (kept, _) = Datapath::prepare(&config).unwrap();
    assert_eq!(kept.maps.dump().unwrap().maglev.len(), 5000, "one that is larger stays");
    purge(&config).unwrap();
}
