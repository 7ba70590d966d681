//! Which channels of a connection the broker has sent a message back on, because no queue takes it.
//!
//! The broker sends a message back before it confirms it (`basic.return`, AMQP 0-9-1 section 1.8.3.9). lapin hands what came back to
//! whatever message is confirmed next, and with many under way that is often another one: that one would be taken for lost, and the
//! one that is lost for kept. So it is noted here, from the bytes that arrive, before lapin sees them.

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use super::lock;

/// Type, channel and size of a frame's payload.
const HEADER: usize = 7;
/// Of a payload that is a method: its class and its number.
const METHOD: usize = 4;
const METHOD_FRAME: u8 = 1;
const BASIC_RETURN: [u8; METHOD] = [0, 60, 0, 50];

#[derive(Clone, Debug, Default)]
pub(super) struct Returns(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    any: AtomicBool,
    channels: Mutex<HashSet<u16>>,
}

impl Returns {
    /// Whether anything came back on that channel. It has by the time that what was published there is confirmed.
    pub fn any_on(&self, channel: u16) -> bool {
        self.0.any.load(Ordering::Acquire) && lock(&self.0.channels).contains(&channel)
    }

    fn note(&self, channel: u16) {
        lock(&self.0.channels).insert(channel);
        self.0.any.store(true, Ordering::Release);
    }
}

/// Looks through the frames of one connection, however they are cut.
#[derive(Debug, Default)]
pub(super) struct Scanner {
    returns: Returns,
    /// A frame's beginning, as far as it is there.
    begun: Vec<u8>,
    /// Left of the frame that is gone through.
    rest: u64,
}

impl Scanner {
    pub fn new(returns: Returns) -> Self {
        Self { returns, ..Self::default() }
    }

    /// Goes through what has arrived.
    pub fn see(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.rest > 0 {
                let skipped = usize::try_from(self.rest).map_or(bytes.len(), |rest| rest.min(bytes.len()));
                self.rest -= skipped as u64;
                bytes = &bytes[skipped..];
                continue;
            }
            let wanted = self.wanted() - self.begun.len();
            let (taken, left) = bytes.split_at(wanted.min(bytes.len()));
            self.begun.extend_from_slice(taken);
            bytes = left;
            if self.begun.len() == self.wanted() {
                self.end();
            }
        }
    }

    /// How much of the frame is looked at.
    fn wanted(&self) -> usize {
        match self.begun[..] {
            [METHOD_FRAME, _, _, a, b, c, d, ..] if u32::from_be_bytes([a, b, c, d]) as usize >= METHOD => HEADER + METHOD,
            _ => HEADER,
        }
    }

    fn end(&mut self) {
        let begun = std::mem::take(&mut self.begun);
        let [_, high, low, a, b, c, d, ref method @ ..] = begun[..] else { return };
        if *method == BASIC_RETURN {
            self.returns.note(u16::from_be_bytes([high, low]));
        }
        // A frame ends with a byte of its own.
        self.rest = u64::from(u32::from_be_bytes([a, b, c, d])) + 1 - method.len() as u64;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(kind: u8, channel: u16, payload: &[u8]) -> Vec<u8> {
        let size = u32::try_from(payload.len()).unwrap();
        [&[kind][..], &channel.to_be_bytes(), &size.to_be_bytes(), payload, &[0xCE]].concat()
    }

    fn seen(bytes: &[u8], cuts: &[usize]) -> Returns {
        let returns = Returns::default();
        let mut scanner = Scanner::new(returns.clone());
        let mut rest = bytes;
        for cut in cuts {
            let (piece, left) = rest.split_at((*cut).min(rest.len()));
            scanner.see(piece);
            rest = left;
        }
        scanner.see(rest);
        returns
    }

    proptest! {
        #[test]
        fn what_came_back_is_noted_with_its_channel_however_the_frames_are_cut(
            frames in prop::collection::vec((0_u8..=9, 0_u16..4, prop::collection::vec(any::<u8>(), 0..30), any::<bool>()), 0..20),
            cuts in prop::collection::vec(0_usize..40, 0..60),
        ) {
            let (mut bytes, mut expected) = (Vec::new(), HashSet::new());
            for (kind, channel, payload, is_return) in frames {
                let payload = if is_return { [&BASIC_RETURN[..], &payload].concat() } else { payload };
                if kind == METHOD_FRAME && payload.starts_with(&BASIC_RETURN) {
                    expected.insert(channel);
                }
                bytes.extend(frame(kind, channel, &payload));
            }
            let returns = seen(&bytes, &cuts);
            for channel in 0..4 {
                prop_assert_eq!(returns.any_on(channel), expected.contains(&channel));
            }
        }
    }

    #[test]
    fn nothing_but_a_method_frame_is_taken_for_one() {
        let body = frame(3, 1, &BASIC_RETURN);
        assert!(!seen(&body, &[]).any_on(1));
        assert!(seen(&frame(METHOD_FRAME, 1, &BASIC_RETURN), &[]).any_on(1));
    }
}
