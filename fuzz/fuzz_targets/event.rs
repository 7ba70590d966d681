//! Notification bodies as anybody with the token can send them, and what comes off the queue.
#![no_main]

use countersign::{
    event::PushEvent,
    intake::{Incoming, Kind},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    for content_type in ["application/json", "application/cloudevents+json", "application/cloudevents-batch+json"] {
        let content_type = Some(content_type.to_owned());
        let incoming = Incoming { body: data.to_vec().into(), content_type, ..Incoming::default() };
        let _ = Kind::Distribution.parse(&incoming);
        let _ = Kind::CloudEvents.parse(&incoming);
    }
    if let Ok(event) = PushEvent::from_cloud_event(data) {
        let again = PushEvent::from_cloud_event(&event.to_cloud_event()).expect("what we write, we read");
        assert_eq!(event, again);
    }
});
