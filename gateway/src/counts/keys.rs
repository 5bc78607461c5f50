//! How many distinct keys there were.

/// Registers: the estimate is off by 1.04 / √1024 = 3 % as a rule.
const REGISTERS: usize = 1 << BITS;
/// Bits of a hash that choose the register.
const BITS: u32 = 10;

/// A HyperLogLog (Flajolet et al., AofA 2007): register `hash >> 54` holds the most leading zeros, plus one, that the
/// other 54 bits of a hash of its had. The hash is the xxh3-64 of the key; sets of several gateways merge by the
/// maximum of each register. Kept here because the registers go over the wire as they are.
#[derive(Debug, Clone, Default)]
pub(super) struct Keys(Vec<u8>);

impl Keys {
    pub(super) fn insert(&mut self, hash: u64) {
        if self.0.is_empty() {
            self.0 = vec![0; REGISTERS];
        }
        // The marker bit ends the count where all 54 bits are zero.
        let rest = (hash << BITS) | (1 << (BITS - 1));
        // At most 55.
        let rank = (rest.leading_zeros() + 1) as u8;
        let register = &mut self.0[(hash >> (u64::BITS - BITS)) as usize];
        *register = (*register).max(rank);
    }

    /// The registers; none where there was no key.
    pub(super) fn registers(&self) -> Vec<u8> {
        self.0.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::counts::key_hash;

    /// The estimate of the paper, without its corrections for very small and very large sets.
    fn estimate(registers: &[u8]) -> f64 {
        let sum: f64 = registers.iter().map(|&rank| (-f64::from(rank)).exp2()).sum();
        let count = registers.len() as f64;
        0.7213 / (1.0 + 1.079 / count) * count * count / sum
    }

    #[test]
    fn distinct_keys_are_counted_within_a_tenth_however_often_each_comes() {
        let mut keys = Keys::default();
        for round in 0..3 {
            for user in 0..20_000 {
                keys.insert(key_hash(&format!("user-{user}")));
            }
            let estimate = estimate(&keys.registers());
            assert!(
                (18_000.0..22_000.0).contains(&estimate),
                "round {round}: {estimate}"
            );
        }
    }

    #[test]
    fn the_rarest_hashes_fit() {
        let mut keys = Keys::default();
        keys.insert(0);
        keys.insert(u64::MAX);
        let registers = keys.registers();
        assert_eq!((registers.len(), registers[0], registers[1023]), (1024, 55, 1));
    }
}
