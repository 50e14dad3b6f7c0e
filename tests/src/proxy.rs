//! Stands between clients and brokers on the wire, and keeps requests back: what a network does that is slow or cut.

use std::collections::{HashMap, HashSet};
use std::io::{self, Read, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_mins(1);
/// Of a request's header: its kind, and the number by which it is answered.
const HEAD: usize = 8;

/// Kinds of requests, by their numbers in Kafka's protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i16)]
pub enum Request {
    /// Records.
    Produce = 0,
    /// A producer takes over its transactional id.
    InitProducerId = 22,
    /// Partitions that a transaction is to write to.
    AddPartitionsToTxn = 24,
    /// A group whose offsets a transaction is to hold.
    AddOffsetsToTxn = 25,
    /// The end of a transaction.
    EndTxn = 26,
    /// Offsets that are part of a transaction.
    TxnOffsetCommit = 28,
}

impl Request {
    /// All that the transactions' coordinator is asked.
    pub const OF_COORDINATOR: [Self; 4] =
        [Self::InitProducerId, Self::AddPartitionsToTxn, Self::AddOffsetsToTxn, Self::EndTxn];
}

/// Answers that may hold addresses: Metadata and `FindCoordinator`, and Produce and Fetch where they name a new leader.
const WITH_ADDRESSES: [i16; 4] = [3, 10, 0, 1];

/// The ends of a connection, of which one may be closed without the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The client hears nothing more, and may still ask.
    Client,
    /// The broker hears nothing more, and may still answer.
    Broker,
}

struct Connection {
    client: Weak<TcpStream>,
    broker: Weak<TcpStream>,
}

struct Held {
    kind: i16,
    frame: Vec<u8>,
    broker: Arc<TcpStream>,
    /// It is on its way. Until its answer has come its connection stays open, also where its sender is gone.
    released: bool,
}

#[derive(Default)]
struct State {
    holding: HashSet<i16>,
    held: Vec<Held>,
    /// Answers by kind.
    answers: HashMap<i16, usize>,
    connections: Vec<Connection>,
    /// Nothing passes, either way, and no connection ends.
    silent: bool,
    /// How long each frame is on its way, one after the other.
    delay: Duration,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for as long as a frame is on its way.
    fn travel(&self) {
        let state = self.changed.wait_while(self.lock(), |state| state.silent);
        let delay = state.unwrap_or_else(PoisonError::into_inner).delay;
        std::thread::sleep(delay);
    }
}

/// A proxy for each broker. Its threads end with the process.
pub struct Proxy {
    /// The addresses by which the brokers are reached through it.
    pub bootstrap_servers: String,
    shared: Arc<Shared>,
}

impl Proxy {
    /// Stands before the brokers at `servers`, each `127.0.0.1:PORT`.
    pub fn start(servers: &str) -> Self {
        let shared = Arc::new(Shared::default());
        let brokers: Vec<u16> =
            servers.split(',').map(|server| server.rsplit(':').next().unwrap().parse().unwrap()).collect();
        let listeners: Vec<TcpListener> =
            brokers.iter().map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let ports: Vec<(u16, u16)> = brokers
            .iter()
            .zip(&listeners)
            .map(|(&broker, listener)| (broker, listener.local_addr().unwrap().port()))
            .collect();
        let bootstrap_servers =
            ports.iter().map(|(_, port)| format!("127.0.0.1:{port}")).collect::<Vec<_>>().join(",");
        for (listener, (broker, _)) in listeners.into_iter().zip(ports.clone()) {
            let (shared, ports) = (Arc::clone(&shared), ports.clone());
            std::thread::spawn(move || {
                for client in listener.incoming().flatten() {
                    // A broker that is down is one that refuses connections.
                    let Ok(broker) = TcpStream::connect(("127.0.0.1", broker)) else { continue };
                    join(&shared, Arc::new(client), Arc::new(broker), ports.clone());
                }
            });
        }
        Self { bootstrap_servers, shared }
    }

    /// Keeps back every request of this kind from now on.
    pub fn hold(&self, kind: Request) {
        self.shared.lock().holding.insert(kind as i16);
    }

    /// Keeps back no more of this kind. Those that are held stay so.
    pub fn let_pass(&self, kind: Request) {
        self.shared.lock().holding.remove(&(kind as i16));
    }

    /// Sends on what is held of this kind, by the connections that it came on, and waits until all of it is answered.
    pub fn release(&self, kind: Request) {
        let mut state = self.shared.lock();
        let mut answers = state.answers.get(&(kind as i16)).copied().unwrap_or(0);
        let mut frames = Vec::new();
        for held in state.held.iter_mut().filter(|held| held.kind == kind as i16) {
            held.released = true;
            answers += 1;
            frames.push((Arc::clone(&held.broker), held.frame.clone()));
        }
        drop(state);
        for (broker, frame) in frames {
            (&*broker).write_all(&frame).unwrap();
        }
        self.wait("an answer to what was late", |state| state.answers.get(&(kind as i16)) >= Some(&answers));
        self.shared.lock().held.retain(|held| !held.released);
    }

    /// Answers so far to requests of this kind.
    pub fn answers(&self, kind: Request) -> usize {
        self.shared.lock().answers.get(&(kind as i16)).copied().unwrap_or(0)
    }

    /// Waits until a request of this kind is held.
    pub fn wait_held(&self, kind: Request) {
        self.wait("a request that is held", |state| {
            state.held.iter().any(|held| held.kind == kind as i16 && !held.released)
        });
    }

    /// Waits until there are `answers` answers to requests of this kind.
    pub fn wait_answers(&self, kind: Request, answers: usize) {
        self.wait("answers", |state| state.answers.get(&(kind as i16)) >= Some(&answers));
    }

    /// Sends on what is held of these kinds, wherever its connection still is one. Nobody waits for the answers.
    pub fn let_go(&self, kinds: &[Request]) {
        let is_meant = |kind: i16| kinds.iter().any(|&meant| meant as i16 == kind);
        let mut state = self.shared.lock();
        state.holding.retain(|&kind| !is_meant(kind));
        let (released, kept): (Vec<Held>, _) =
            std::mem::take(&mut state.held).into_iter().partition(|held| is_meant(held.kind));
        state.held = kept;
        drop(state);
        for held in released {
            let _ = (&*held.broker).write_all(&held.frame);
        }
    }

    /// Cuts every connection, as a firewall does that forgets idle ones.
    pub fn cut(&self) {
        self.on_each(|client, _| client.shutdown(Shutdown::Both));
    }

    /// Closes one direction of every connection, towards this end of it.
    pub fn half_close(&self, end: End) {
        self.on_each(|client, broker| match end {
            End::Client => client.shutdown(Shutdown::Write),
            End::Broker => broker.shutdown(Shutdown::Write),
        });
    }

    /// Lets nothing pass, or everything again, as where a route is lost and found. No connection ends.
    pub fn set_silent(&self, silent: bool) {
        self.shared.lock().silent = silent;
        self.shared.changed.notify_all();
    }

    /// Has each frame take so long on its way.
    pub fn set_delay(&self, delay: Duration) {
        self.shared.lock().delay = delay;
    }

    fn on_each(&self, act: impl Fn(&TcpStream, &TcpStream) -> io::Result<()>) {
        for connection in &self.shared.lock().connections {
            if let (Some(client), Some(broker)) = (connection.client.upgrade(), connection.broker.upgrade()) {
                // Fails where the connection has just ended.
                let _ = act(&client, &broker);
            }
        }
    }

    fn wait(&self, what: &str, holds: impl Fn(&State) -> bool) {
        let waited =
            self.shared.changed.wait_timeout_while(self.shared.lock(), PATIENCE, |state| !holds(state));
        assert!(!waited.unwrap_or_else(PoisonError::into_inner).1.timed_out(), "waited a minute for {what}");
    }
}

/// Passes frames on between the two, each way on a thread of its own.
fn join(shared: &Arc<Shared>, client: Arc<TcpStream>, broker: Arc<TcpStream>, ports: Vec<(u16, u16)>) {
    {
        let mut state = shared.lock();
        state.connections.retain(|it| it.client.strong_count() > 0 && it.broker.strong_count() > 0);
        let (client, broker) = (Arc::downgrade(&client), Arc::downgrade(&broker));
        state.connections.push(Connection { client, broker });
    }
    // Kinds of the requests that wait for an answer, by their numbers.
    let asked = Arc::new(Mutex::new(HashMap::new()));
    {
        let (shared, client, broker, asked) =
            (Arc::clone(shared), Arc::clone(&client), Arc::clone(&broker), Arc::clone(&asked));
        std::thread::spawn(move || {
            while let Ok(frame) = read_frame(&client, HEAD) {
                let kind = i16::from_be_bytes([frame[4], frame[5]]);
                asked.lock().unwrap().insert(number(&frame[8..]), kind);
                let mut state = shared.lock();
                if state.holding.contains(&kind) {
                    state.held.push(Held { kind, frame, broker: Arc::clone(&broker), released: false });
                    shared.changed.notify_all();
                    continue;
                }
                drop(state);
                shared.travel();
                if (&*broker).write_all(&frame).is_err() {
                    break;
                }
            }
            // What is held may still arrive, whether or not its sender waits for it.
            if !shared.lock().held.iter().any(|held| Arc::ptr_eq(&held.broker, &broker)) {
                let _ = broker.shutdown(Shutdown::Both);
            }
        });
    }
    let shared = Arc::clone(shared);
    std::thread::spawn(move || {
        while let Ok(mut frame) = read_frame(&broker, 4) {
            let kind = asked.lock().unwrap().remove(&number(&frame[4..]));
            if kind.is_some_and(|kind| WITH_ADDRESSES.contains(&kind)) {
                rewrite_ports(&mut frame, &ports);
            }
            shared.travel();
            // Its sender may have given up on it.
            let _ = (&*client).write_all(&frame);
            *shared.lock().answers.entry(kind.unwrap_or(-1)).or_default() += 1;
            shared.changed.notify_all();
        }
        let _ = client.shutdown(Shutdown::Both);
    });
}

/// A frame with its length before it, which has at least `least` bytes.
fn read_frame(mut from: &TcpStream, least: usize) -> io::Result<Vec<u8>> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let size = usize::try_from(u32::from_be_bytes(length)).unwrap();
    assert!(size >= least, "a frame of {size} bytes is none of Kafka's");
    let mut frame = length.to_vec();
    frame.resize(4 + size, 0);
    from.read_exact(&mut frame[4..])?;
    Ok(frame)
}

fn number(bytes: &[u8]) -> i32 {
    i32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

/// Puts the proxy's ports in place of the brokers': a port follows on its host in every answer that has any.
fn rewrite_ports(frame: &mut [u8], ports: &[(u16, u16)]) {
    let address = |port: u16| [&b"127.0.0.1"[..], &u32::from(port).to_be_bytes()].concat();
    for &(broker, proxy) in ports {
        let (old, new) = (address(broker), address(proxy));
        let found: Vec<usize> = frame
            .windows(old.len())
            .enumerate()
            .filter(|(_, bytes)| *bytes == old)
            .map(|(at, _)| at)
            .collect();
        for at in found {
            frame[at..at + new.len()].copy_from_slice(&new);
        }
    }
}
