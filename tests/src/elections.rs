//! Elections of leaders among brokers that are all well, and a broker's leave for good: the requests for it, which no client of
//! ours has.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use crate::Kafka;

/// Kafka's numbers of the requests, and the versions that are spoken here.
const ALTER_PARTITION_REASSIGNMENTS: (i16, i16) = (45, 0);
const ELECT_LEADERS: (i16, i16) = (43, 2);
const UNREGISTER_BROKER: (i16, i16) = (64, 0);
const PATIENCE: Duration = Duration::from_secs(30);
/// What the brokers may take for it.
const TIMEOUT_MS: i32 = 20_000;
/// The election is of the first in each partition's list of copies, whoever leads now.
const PREFERRED: u8 = 0;

impl Kafka {
    /// Has `leader` of each partition be the first of its copies, then has the brokers elect those; how many leaders are
    /// others than before.
    pub fn elect(&self, leader: impl Fn(&str, i32) -> i32) -> usize {
        let before = self.leaders();
        let brokers = self.brokers as i32;
        let mut body = Body::default();
        body.int(TIMEOUT_MS).array(before.len());
        for (topic, partition) in before.keys() {
            let first = leader(topic, *partition);
            let others = (1..=brokers).filter(|&node| node != first);
            let copies: Vec<i32> = std::iter::once(first).chain(others).collect();
            body.text(topic).array(1).int(*partition).array(copies.len());
            for node in copies {
                body.int(node);
            }
            body.no_tags().no_tags();
        }
        body.no_tags();
        self.ask(ALTER_PARTITION_REASSIGNMENTS, &body);
        let mut body = Body::default();
        // All partitions: a list that is null.
        body.byte(PREFERRED).byte(0).int(TIMEOUT_MS).no_tags();
        self.ask(ELECT_LEADERS, &body);
        let after = self.leaders();
        before.iter().filter(|(partition, leader)| after.get(partition) != Some(leader)).count()
    }

    /// Takes a broker that has ended out of the cluster, which forgets about it.
    pub fn unregister(&self, node: usize) {
        let mut body = Body::default();
        body.int(node as i32).no_tags();
        self.ask(UNREGISTER_BROKER, &body);
    }

    /// Asks a broker, whichever answers, and takes no error for an answer.
    fn ask(&self, (kind, version): (i16, i16), body: &Body) {
        let mut frame = Vec::new();
        frame.extend(kind.to_be_bytes());
        frame.extend(version.to_be_bytes());
        // The request's number, no client id, no tags.
        frame.extend(1_i32.to_be_bytes());
        frame.extend((-1_i16).to_be_bytes());
        frame.push(0);
        frame.extend(&body.0);
        let mut stream =
            self.bootstrap_servers.split(',').find_map(|it| TcpStream::connect(it).ok()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(&u32::try_from(frame.len()).unwrap().to_be_bytes()).unwrap();
        stream.write_all(&frame).unwrap();
        let mut length = [0; 4];
        stream.read_exact(&mut length).unwrap();
        let mut answer = vec![0; u32::from_be_bytes(length) as usize];
        stream.read_exact(&mut answer).unwrap();
        // Behind the number, the tags and the time that was throttled.
        let error = i16::from_be_bytes([answer[9], answer[10]]);
        assert_eq!(error, 0, "the brokers refuse request {kind}");
    }
}

/// The body of a request in Kafka's compact encoding.
#[derive(Default)]
struct Body(Vec<u8>);

impl Body {
    fn byte(&mut self, value: u8) -> &mut Self {
        self.0.push(value);
        self
    }

    fn int(&mut self, value: i32) -> &mut Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    /// The length of an array, or a text, whose elements follow.
    fn array(&mut self, length: usize) -> &mut Self {
        let mut rest = length + 1;
        while rest >= 0x80 {
            self.0.push((rest & 0x7f) as u8 | 0x80);
            rest >>= 7;
        }
        self.0.push(rest as u8);
        self
    }

    fn text(&mut self, text: &str) -> &mut Self {
        self.array(text.len()).0.extend(text.as_bytes());
        self
    }

    fn no_tags(&mut self) -> &mut Self {
        self.byte(0)
    }
}
