//! Resource quantities: the grammar of `resource.Quantity`, held as whole nano-units so that comparison is exact.

use std::fmt;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// An amount in units of 10⁻⁹. Covers ±1.7 × 10²⁹ whole units, more than any int64 quantity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Amount(i128);

/// The text is not a quantity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no quantity; write a number with an optional suffix such as 500m, 1.5, 2Gi, 1e3")]
pub struct ParseError(pub String);

const NANO: i128 = 1_000_000_000;

impl Amount {
    pub const ZERO: Amount = Amount(0);

    /// From whole units.
    pub fn from_units(n: i64) -> Amount {
        Amount(n as i128 * NANO)
    }

    /// From thousandths.
    pub fn from_milli(n: i64) -> Amount {
        Amount(n as i128 * (NANO / 1000))
    }

    /// Whole units, rounded up (away from zero for positive amounts), saturating.
    pub fn units(self) -> i64 {
        clamp(div_up(self.0, NANO))
    }

    /// Thousandths, rounded up, saturating.
    pub fn milli(self) -> i64 {
        clamp(div_up(self.0, NANO / 1000))
    }

    pub fn is_zero(self) -> bool {
        self.0 == 0
    }

    pub fn saturating_add(self, other: Amount) -> Amount {
        Amount(self.0.saturating_add(other.0))
    }

    pub fn saturating_sub(self, other: Amount) -> Amount {
        Amount(self.0.saturating_sub(other.0))
    }
}

fn div_up(a: i128, b: i128) -> i128 {
    let q = a / b;
    if a % b > 0 { q + 1 } else { q }
}

fn clamp(n: i128) -> i64 {
    n.clamp(i64::MIN as i128, i64::MAX as i128) as i64
}

/// The multiplier of a suffix as (numerator, denominator).
fn suffix(s: &str) -> Option<(i128, i128)> {
    Some(match s {
        "n" => (1, NANO),
        "u" => (1, 1_000_000),
        "m" => (1, 1000),
        "" => (1, 1),
        "k" => (1000, 1),
        "M" => (1000_i128.pow(2), 1),
        "G" => (1000_i128.pow(3), 1),
        "T" => (1000_i128.pow(4), 1),
        "P" => (1000_i128.pow(5), 1),
        "E" => (1000_i128.pow(6), 1),
        "Ki" => (1 << 10, 1),
        "Mi" => (1 << 20, 1),
        "Gi" => (1 << 30, 1),
        "Ti" => (1 << 40, 1),
        "Pi" => (1 << 50, 1),
        "Ei" => (1 << 60, 1),
        _ => {
            let exp: i32 = s.strip_prefix(['e', 'E'])?.parse().ok()?;
            let p = 10_i128.checked_pow(exp.unsigned_abs())?;
            if exp >= 0 { (p, 1) } else { (1, p) }
        }
    })
}

impl std::str::FromStr for Amount {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Amount, ParseError> {
        let bad = || ParseError(text.to_owned());
        let (negative, rest) = match text.strip_prefix('-') {
            Some(r) => (true, r),
            None => (false, text.strip_prefix('+').unwrap_or(text)),
        };
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let (number, suf) = rest.split_at(end);
        let (num, den) = suffix(suf).ok_or_else(bad)?;
        let (whole, frac) = number.split_once('.').unwrap_or((number, ""));
        if (whole.is_empty() && frac.is_empty()) || frac.contains('.') {
            return Err(bad());
        }
        let digits = format!("{whole}{frac}");
        let mantissa: i128 =
            if digits.len() > 30 { return Err(bad()) } else { digits.parse().map_err(|_| bad())? };
        let scale = 10_i128.checked_pow(frac.len() as u32).ok_or_else(bad)?;
        let scaled = mantissa.checked_mul(num).and_then(|m| m.checked_mul(NANO)).unwrap_or(i128::MAX);
        let nano = div_up(scaled, den.saturating_mul(scale));
        Ok(Amount(if negative { -nano } else { nano }))
    }
}

impl fmt::Display for Amount {
    /// Canonical decimal form: whole units where exact, else m, u or n.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, suffix) in [(NANO, ""), (NANO / 1000, "m"), (1000, "u")] {
            if self.0 % unit == 0 {
                return write!(f, "{}{suffix}", self.0 / unit);
            }
        }
        write!(f, "{}n", self.0)
    }
}

impl std::ops::Add for Amount {
    type Output = Amount;
    fn add(self, other: Amount) -> Amount {
        self.saturating_add(other)
    }
}

impl std::ops::AddAssign for Amount {
    fn add_assign(&mut self, other: Amount) {
        *self = self.saturating_add(other);
    }
}

impl std::ops::Sub for Amount {
    type Output = Amount;
    fn sub(self, other: Amount) -> Amount {
        self.saturating_sub(other)
    }
}

impl std::iter::Sum for Amount {
    fn sum<I: Iterator<Item = Amount>>(iter: I) -> Amount {
        iter.fold(Amount::ZERO, Amount::saturating_add)
    }
}

impl TryFrom<&Quantity> for Amount {
    type Error = ParseError;
    fn try_from(q: &Quantity) -> Result<Amount, ParseError> {
        q.0.parse()
    }
}

impl From<Amount> for Quantity {
    fn from(a: Amount) -> Quantity {
        Quantity(a.to_string())
    }
}

/// An unreadable quantity counts as zero: the API server has refused it before it can get here.
pub fn amount_or_zero(q: &Quantity) -> Amount {
    Amount::try_from(q).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn a(s: &str) -> Amount {
        s.parse().unwrap()
    }

    #[test]
    fn reads_every_suffix() {
        assert_eq!(a("100m").milli(), 100);
        assert_eq!(a("1.5").milli(), 1500);
        assert_eq!(a("0.1m").milli(), 1);
        assert_eq!(a("128Mi").units(), 128 << 20);
        assert_eq!(a("1e3").units(), 1000);
        assert_eq!(a("1E").units(), 1_000_000_000_000_000_000);
        assert_eq!(a("-2k").units(), -2000);
        assert_eq!(a(".5Gi").units(), 1 << 29);
        for bad in ["", "x", "1.2.3", "1Zi", "--1", "1 ", "m"] {
            assert!(bad.parse::<Amount>().is_err(), "{bad}");
        }
    }

    #[test]
    fn prints_canonically() {
        for (i, o) in [("1500m", "1500m"), ("2000m", "2"), ("1Ki", "1024"), ("5n", "5n")] {
            assert_eq!(a(i).to_string(), o);
        }
    }

    proptest::proptest! {
        #[test]
        fn printing_and_reading_agree(n in proptest::num::i64::ANY) {
            let x = Amount::from_milli(n);
            proptest::prop_assert_eq!(x, a(&x.to_string()));
        }

        #[test]
        fn never_panics(s in "\\PC*") {
            let _ = s.parse::<Amount>();
        }
    }
}
