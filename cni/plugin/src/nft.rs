//! nf_tables over netlink: the few messages that [`crate::nat`] needs, encoded by hand. The `nft` program is not needed.
//!
//! A [`Batch`] takes effect as a whole or not at all.

use std::io;

use crate::netfilter::{
    ACK, Attributes, DUMP, ERROR, Family, Netfilter, REQUEST, attribute, attributes, message,
};

const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEW_TABLE: u16 = 0;
const GET_TABLE: u16 = 1;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const NEW_RULE: u16 = 6;
const NEW_SET: u16 = 9;
const NEW_ELEMENTS: u16 = 12;
const GET_ELEMENTS: u16 = 13;
const DELETE_ELEMENTS: u16 = 14;

const EXCLUSIVE: u16 = 0x200;
const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;

const LIST_ELEMENT: u16 = 1;
const SET_IS_MAP: u32 = 0x8;

/// A register of 4 bytes; longer values fill those that follow. NFT_REG32_00 is 8.
pub const REGISTER: u32 = 8;
const VERDICT_REGISTER: u32 = 0;

/// What a rule is made of; all of them work on registers.
#[derive(Clone, Debug)]
pub enum Expr<'a> {
    /// `len` bytes of the network header from `offset`.
    Network {
        to: u32,
        offset: u32,
        len: u32,
    },
    DestinationPort {
        to: u32,
    },
    Protocol {
        to: u32,
    },
    InputName {
        to: u32,
    },
    /// What kind of address the destination is to this node.
    DestinationType {
        to: u32,
    },
    ConntrackStatus {
        to: u32,
    },
    And {
        register: u32,
        mask: &'a [u8],
    },
    Equal {
        register: u32,
        value: &'a [u8],
    },
    NotEqual {
        register: u32,
        value: &'a [u8],
    },
    InSet {
        set: &'a str,
        register: u32,
    },
    /// What the map has for the key.
    Map {
        map: &'a str,
        register: u32,
        to: u32,
    },
    DestinationNat {
        family: Family,
        address: u32,
        port: u32,
    },
    Masquerade,
    Jump(&'a str),
    Drop,
}

/// Where a base chain stands.
#[derive(Clone, Copy, Debug)]
pub struct Hook {
    pub kind: &'static str,
    pub number: u32,
    pub priority: i32,
}

/// Types of a set's key and data: numbers that only `nft list` reads, and lengths.
#[derive(Clone, Copy, Debug)]
pub struct Typed {
    pub number: u32,
    pub bytes: u32,
}

/// A key and what the map has for it; empty in a set.
pub type Element = (Vec<u8>, Vec<u8>);

/// NFTA_DATA_VALUE in an attribute of its own.
fn value(a: &mut Attributes, kind: u16, value: &[u8]) {
    a.nested(kind, |a| {
        a.bytes(1, value);
    });
}

impl Expr<'_> {
    fn name(&self) -> &'static str {
        match self {
            Expr::Network { .. } | Expr::DestinationPort { .. } => "payload",
            Expr::Protocol { .. } | Expr::InputName { .. } => "meta",
            Expr::DestinationType { .. } => "fib",
            Expr::ConntrackStatus { .. } => "ct",
            Expr::And { .. } => "bitwise",
            Expr::Equal { .. } | Expr::NotEqual { .. } => "cmp",
            Expr::InSet { .. } | Expr::Map { .. } => "lookup",
            Expr::DestinationNat { .. } => "nat",
            Expr::Masquerade => "masq",
            Expr::Jump(_) | Expr::Drop => "immediate",
        }
    }

    fn data(&self, a: &mut Attributes) {
        const NETWORK_HEADER: u32 = 1;
        const TRANSPORT_HEADER: u32 = 2;
        match *self {
            Expr::Network { to, offset, len } => {
                a.number(1, to).number(2, NETWORK_HEADER).number(3, offset).number(4, len);
            }
            Expr::DestinationPort { to } => {
                a.number(1, to).number(2, TRANSPORT_HEADER).number(3, 2).number(4, 2);
            }
            Expr::Protocol { to } => {
                a.number(1, to).number(2, 16);
            }
            Expr::InputName { to } => {
                a.number(1, to).number(2, 6);
            }
            Expr::DestinationType { to } => {
                // NFT_FIB_RESULT_ADDRTYPE of NFTA_FIB_F_DADDR.
                a.number(1, to).number(2, 3).number(3, 2);
            }
            Expr::ConntrackStatus { to } => {
                a.number(1, to).number(2, 2);
            }
            Expr::And { register, mask } => {
                a.number(1, register).number(2, register).number(3, mask.len() as u32);
                value(a, 4, mask);
                value(a, 5, &vec![0; mask.len()]);
            }
            Expr::Equal { register, value: wanted } => {
                a.number(1, register).number(2, 0);
                value(a, 3, wanted);
            }
            Expr::NotEqual { register, value: other } => {
                a.number(1, register).number(2, 1);
                value(a, 3, other);
            }
            Expr::InSet { set, register } => {
                a.text(1, set).number(2, register);
            }
            Expr::Map { map, register, to } => {
                a.text(1, map).number(2, register).number(3, to);
            }
            Expr::DestinationNat { family, address, port } => {
                a.number(1, 1).number(2, u32::from(family.number())).number(3, address).number(5, port);
            }
            Expr::Masquerade => {
                // NF_NAT_RANGE_PROTO_RANDOM_FULLY: two flows that begin at once do not fight for a port.
                a.number(1, 0x10);
            }
            Expr::Jump(chain) => verdict(a, -3, Some(chain)),
            Expr::Drop => verdict(a, 0, None),
        }
    }
}

fn verdict(a: &mut Attributes, code: i32, chain: Option<&str>) {
    a.number(1, VERDICT_REGISTER).nested(2, |data| {
        data.nested(2, |v| {
            v.bytes(1, &code.to_be_bytes());
            if let Some(chain) = chain {
                v.text(2, chain);
            }
        });
    });
}

/// Changes of one table that take effect together.
pub struct Batch<'a> {
    table: &'a str,
    family: Family,
    bytes: Vec<u8>,
    /// Where the last message begins, which asks for an answer.
    last: usize,
    messages: u32,
}

impl<'a> Batch<'a> {
    pub fn new(family: Family, table: &'a str) -> Batch<'a> {
        let mut batch = Batch { table, family, bytes: Vec::new(), last: 0, messages: 0 };
        batch.frame(BATCH_BEGIN);
        batch
    }

    fn frame(&mut self, kind: u16) {
        let head = message(kind, REQUEST, self.messages, 0, SUBSYSTEM, &[]);
        self.messages += 1;
        self.bytes.extend_from_slice(&head);
    }

    fn push(&mut self, kind: u16, flags: u16, attributes: &Attributes) {
        self.last = self.bytes.len();
        let kind = SUBSYSTEM << 8 | kind;
        let message = message(kind, REQUEST | flags, self.messages, self.family.number(), 0, &attributes.0);
        self.messages += 1;
        self.bytes.extend_from_slice(&message);
    }

    /// The comment is what [`Nftables::comment`] reads.
    pub fn new_table(&mut self, comment: &str) {
        // libnftnl's way to keep a comment: type 0, length, text.
        let mut data = vec![0, u8::try_from(comment.len() + 1).unwrap_or(u8::MAX)];
        data.extend_from_slice(comment.as_bytes());
        data.push(0);
        let mut a = Attributes::default();
        a.text(1, self.table).number(2, 0).bytes(6, &data);
        self.push(NEW_TABLE, CREATE | EXCLUSIVE, &a);
    }

    pub fn delete_table(&mut self) {
        let mut a = Attributes::default();
        a.text(1, self.table);
        self.push(DELETE_TABLE, 0, &a);
    }

    /// A chain that others jump to, or a base chain.
    pub fn new_chain(&mut self, name: &str, hook: Option<Hook>) {
        let mut a = Attributes::default();
        a.text(1, self.table).text(3, name);
        if let Some(hook) = hook {
            a.nested(4, |h| {
                h.number(1, hook.number).bytes(2, &hook.priority.to_be_bytes());
            });
            // Packets that no rule takes go on.
            a.number(5, 1).text(7, hook.kind);
        }
        self.push(NEW_CHAIN, CREATE | EXCLUSIVE, &a);
    }

    pub fn new_rule(&mut self, chain: &str, exprs: &[Expr]) {
        let mut a = Attributes::default();
        a.text(1, self.table).text(2, chain).nested(4, |list| {
            for e in exprs {
                list.nested(LIST_ELEMENT, |x| {
                    x.text(1, e.name()).nested(2, |d| e.data(d));
                });
            }
        });
        self.push(NEW_RULE, CREATE | APPEND, &a);
    }

    /// A set, or a map when it has data. `id` is unique in the batch.
    pub fn new_set(&mut self, id: u32, name: &str, key: Typed, data: Option<Typed>) {
        let mut a = Attributes::default();
        a.text(1, self.table).text(2, name).number(3, if data.is_some() { SET_IS_MAP } else { 0 });
        a.number(4, key.number).number(5, key.bytes);
        if let Some(data) = data {
            a.number(6, data.number).number(7, data.bytes);
        }
        a.number(10, id);
        self.push(NEW_SET, CREATE | EXCLUSIVE, &a);
    }

    /// An element that is there already with the same data is no error; with other data it is EBUSY.
    pub fn add_elements(&mut self, set: &str, elements: &[Element]) {
        self.elements(NEW_ELEMENTS, CREATE, set, elements);
    }

    /// An element that is not there is ENOENT.
    pub fn delete_elements(&mut self, set: &str, keys: &[Element]) {
        self.elements(DELETE_ELEMENTS, 0, set, keys);
    }

    fn elements(&mut self, kind: u16, flags: u16, set: &str, elements: &[Element]) {
        // An attribute holds 64 KiB at most; an element takes below 100 bytes.
        for some in elements.chunks(500) {
            let mut a = Attributes::default();
            a.text(1, self.table).text(2, set).nested(3, |list| {
                for (key, data) in some {
                    list.nested(LIST_ELEMENT, |e| {
                        value(e, 1, key);
                        if kind == NEW_ELEMENTS && !data.is_empty() {
                            value(e, 2, data);
                        }
                    });
                }
            });
            self.push(kind, flags, &a);
        }
    }
}

/// A conversation about the network namespace in which it was opened.
pub struct Nftables(Netfilter);

impl Nftables {
    pub fn open() -> io::Result<Nftables> {
        Netfilter::open().map(Nftables)
    }

    /// Carries all of it out or, on an error, nothing.
    pub fn commit(&mut self, mut batch: Batch) -> io::Result<()> {
        if batch.last == 0 {
            return Ok(());
        }
        let expected = batch.messages - 1;
        // The end of a batch would be the better place; kernels before 6.10 do not answer it.
        if let Some(flags) = batch.bytes.get_mut(batch.last + 6..batch.last + 8) {
            let asked = <[u8; 2]>::try_from(&*flags).map_or(REQUEST, u16::from_ne_bytes);
            flags.copy_from_slice(&(asked | ACK).to_ne_bytes());
        }
        batch.frame(BATCH_END);
        self.0.send(&batch.bytes)?;
        let mut failure = None;
        self.0.receive(|answer| {
            if answer.kind != ERROR {
                return false;
            }
            if let Some(e) = answer.error() {
                failure.get_or_insert(e);
            }
            // Sequence 0 is the batch itself, which fails as a whole when the kernel cannot commit it.
            answer.sequence == expected || (answer.sequence == 0 && failure.is_some())
        })?;
        failure.map_or(Ok(()), Err)
    }

    /// The comment of a table; `None` when there is no such table.
    pub fn comment(&mut self, family: Family, table: &str) -> io::Result<Option<String>> {
        let mut a = Attributes::default();
        a.text(1, table);
        let mut comment = None;
        let found = self.0.ask(SUBSYSTEM << 8 | GET_TABLE, ACK, family, &a, |payload| {
            let data = attribute(payload, 6).unwrap_or_default();
            let text = data.get(2..data.len().saturating_sub(1)).unwrap_or_default();
            comment = Some(String::from_utf8_lossy(text).into_owned());
        });
        match found {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            other => other.map(|()| comment),
        }
    }

    /// All elements of a set or map.
    pub fn elements(&mut self, family: Family, table: &str, set: &str) -> io::Result<Vec<Element>> {
        let mut a = Attributes::default();
        a.text(1, table).text(2, set);
        let mut found = Vec::new();
        self.0.ask(SUBSYSTEM << 8 | GET_ELEMENTS, DUMP, family, &a, |payload| {
            for (_, element) in attributes(attribute(payload, 3).unwrap_or_default()) {
                let value_of = |kind| attribute(attribute(element, kind)?, 1);
                if let Some(key) = value_of(1) {
                    found.push((key.to_vec(), value_of(2).unwrap_or_default().to_vec()));
                }
            }
        })?;
        Ok(found)
    }
}
