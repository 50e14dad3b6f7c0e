//! Ranks that read one topic together, each a process of its own (`src/bin/rank.rs`), and the hub in the test's process
//! through which they agree.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use sluice_feed::feed::Group;
use sluice_schemas::fingerprint::Fingerprint;

use crate::binary;

/// Ample time for a rank to have its next step, on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_mins(1);
const POLL: Duration = Duration::from_millis(2);
/// Far more values than ranks ever agree on.
const VALUES_MAX: usize = 4096;

/// A rank's place at the hub.
#[derive(Debug)]
pub struct Member(TcpStream);

impl Member {
    /// Joins the hub at `address`.
    pub fn join(address: SocketAddr) -> io::Result<Self> {
        Ok(Self(patient(TcpStream::connect_timeout(&address, PATIENCE)?)?))
    }

    /// Whether all ranks ask it with the same fingerprint.
    pub fn is_equal(&mut self, fingerprint: Fingerprint) -> Result<bool, String> {
        let own = fingerprint
            .as_bytes()
            .chunks_exact(8)
            .map(|chunk| chunk.iter().fold(0_i64, |number, &byte| (number << 8) | i64::from(byte)));
        // Turned over, the smallest is the largest.
        let own: Vec<i64> = own.flat_map(|number| [number, !number]).collect();
        let mut smallest = own.clone();
        self.minimum(&mut smallest)?;
        Ok(smallest == own)
    }
}

impl Group for Member {
    fn minimum(&mut self, values: &mut [i64]) -> Result<(), String> {
        let agreed = send(&mut self.0, values).and_then(|()| receive(&mut self.0));
        let agreed = agreed.map_err(|error| format!("the hub is gone: {error}"))?;
        if agreed.len() != values.len() {
            return Err(format!("the hub gave {} values for {}", agreed.len(), values.len()));
        }
        values.copy_from_slice(&agreed);
        Ok(())
    }
}

/// A connection on which nobody is waited for without end.
fn patient(stream: TcpStream) -> io::Result<TcpStream> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Their number as four bytes, then the values, all of them little-endian.
fn send(stream: &mut impl Write, values: &[i64]) -> io::Result<()> {
    let mut bytes = (values.len() as u32).to_le_bytes().to_vec();
    bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    stream.write_all(&bytes)
}

fn receive(stream: &mut impl Read) -> io::Result<Vec<i64>> {
    let mut count = [0; 4];
    stream.read_exact(&mut count)?;
    let count = u32::from_le_bytes(count) as usize;
    if count > VALUES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{count} values")));
    }
    let mut value = [0; 8];
    let read = |_| stream.read_exact(&mut value).map(|()| i64::from_le_bytes(value));
    (0..count).map(read).collect()
}

/// Gives all ranks the element-wise minimum of what each of them sends.
struct Hub(TcpListener);

impl Hub {
    fn bind() -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        listener.set_nonblocking(true).unwrap();
        Self(listener)
    }

    fn address(&self) -> SocketAddr {
        self.0.local_addr().unwrap()
    }

    /// Serves `world_size` ranks until one of them leaves, then closes all connections; gives up waiting for them once
    /// `stop` is set. `answered` hears of each answer, by round and by how many ranks have it; it counts rounds.
    fn serve(self, world_size: usize, stop: &AtomicBool, mut answered: impl FnMut(usize, usize)) -> usize {
        let mut members = Vec::new();
        while members.len() < world_size {
            match self.0.accept() {
                Ok((stream, _)) => members.push(patient(stream).unwrap()),
                Err(_) if stop.load(Ordering::Relaxed) => return 0,
                Err(_) => std::thread::sleep(POLL),
            }
        }
        // Whoever joins now would wait for ever.
        drop(self);
        let mut rounds = 0;
        while let Ok(values) = members.iter_mut().map(receive).collect::<io::Result<Vec<_>>>() {
            let mut values = values.into_iter();
            let mut smallest = values.next().unwrap();
            for values in values {
                assert_eq!(values.len(), smallest.len(), "all ranks are in the same round");
                for (smallest, value) in smallest.iter_mut().zip(values) {
                    *smallest = value.min(*smallest);
                }
            }
            for (ranks, member) in (1..).zip(&mut members) {
                // One that was killed meanwhile is found out by the next round.
                let _ = send(member, &smallest);
                answered(rounds, ranks);
            }
            rounds += 1;
        }
        for member in members {
            let _ = member.shutdown(Shutdown::Both);
        }
        rounds
    }
}

/// What all ranks of a run are given.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The broker.
    pub bootstrap_servers: String,
    /// Where checkpoints are.
    pub state: PathBuf,
    /// Every other flag, with its value.
    pub flags: BTreeMap<&'static str, String>,
}

impl Settings {
    /// The same settings, one of them changed.
    #[must_use]
    pub fn with(&self, flag: &'static str, value: &impl ToString) -> Self {
        let mut changed = self.clone();
        changed.flags.insert(flag, value.to_string());
        changed
    }
}

/// A micro-batch, as a rank has printed it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Its step, from 1.
    pub step: u64,
    /// Its number in the step; none of one without tokens.
    pub number: Option<u64>,
    /// Its lane.
    pub lane: u64,
    /// Its digest.
    pub digest: String,
    /// The ids of its pieces.
    pub documents: Vec<String>,
}

impl Line {
    /// Reads a line of a rank's.
    ///
    /// # Panics
    /// When it is none.
    pub fn parse(line: &str) -> Self {
        let fields: serde_json::Value = serde_json::from_str(line).unwrap();
        let documents = fields["documents"].as_array().unwrap();
        Self {
            step: fields["step"].as_u64().unwrap(),
            number: fields["number"].as_u64(),
            lane: fields["lane"].as_u64().unwrap(),
            digest: fields["digest"].as_str().unwrap().to_owned(),
            documents: documents.iter().map(|id| id.as_str().unwrap().to_owned()).collect(),
        }
    }
}

/// SIGKILL at a moment of a run.
#[derive(Clone, Copy, Debug)]
pub struct Kill {
    /// After an answer of this round of the hub, from 0.
    pub round: usize,
    /// Once so many ranks have the answer.
    pub answers: usize,
    /// After so long; meanwhile the hub rests, and ranks come no further than to their next question.
    pub delay: Duration,
    /// The rank that is killed; all of them where it is none. Then the others are left to end by themselves.
    pub rank: Option<usize>,
}

/// How a rank has ended.
#[derive(Debug)]
pub struct End {
    /// What it has printed.
    pub lines: Vec<Line>,
    /// How its process ended.
    pub status: ExitStatus,
    /// What it wrote to stderr.
    pub message: String,
}

/// How a run has ended.
#[derive(Debug)]
pub struct Ended {
    /// Each rank's end.
    pub ranks: Vec<End>,
    /// Rounds of the hub.
    pub rounds: usize,
    /// From the kill to the last rank's end.
    pub since_kill: Option<Duration>,
}

impl Ended {
    /// What all ranks have printed.
    pub fn lines(&self) -> impl Iterator<Item = &Line> {
        self.ranks.iter().flat_map(|end| &end.lines)
    }

    /// Asserts that every rank has come to the end of the data.
    #[must_use]
    pub fn well(self) -> Self {
        for (rank, end) in self.ranks.iter().enumerate() {
            assert!(end.status.success(), "rank {rank} ended with {}: {}", end.status, end.message);
        }
        self
    }
}

/// A rank's process, which is killed with this value.
struct Process {
    child: Mutex<Child>,
    stdout: Option<JoinHandle<String>>,
    stderr: Option<JoinHandle<String>>,
}

impl Process {
    fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stdout = Some(read_to_end(child.stdout.take().unwrap()));
        let stderr = Some(read_to_end(child.stderr.take().unwrap()));
        Self { child: Mutex::new(child), stdout, stderr }
    }

    fn kill(&self) {
        // Fails where it has just ended, which is for the test to see.
        let _ = self.child.lock().unwrap().kill();
    }

    fn has_ended(&self) -> bool {
        self.child.lock().unwrap().try_wait().unwrap().is_some()
    }

    fn end(mut self) -> End {
        let status = self.child.lock().unwrap().wait().unwrap();
        let [stdout, message] =
            [&mut self.stdout, &mut self.stderr].map(|read| read.take().unwrap().join().unwrap());
        // A line that was cut off by a kill is none.
        let whole = stdout.rfind('\n').map_or("", |end| &stdout[..end]);
        End { lines: whole.lines().map(Line::parse).collect(), status, message }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // A poisoned lock still holds the process.
        let child = self.child.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        let _ = child.kill();
        let _ = child.wait();
    }
}

fn read_to_end(mut pipe: impl Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut text = String::new();
        pipe.read_to_string(&mut text).unwrap();
        text
    })
}

/// Runs `world_size` ranks, from the checkpoint of a step if one is given, to their end or until they are killed.
pub fn run(settings: &Settings, world_size: usize, resume_from: Option<u64>, kill: Option<Kill>) -> Ended {
    let hub = Hub::bind();
    let ranks: Vec<Process> = (0..world_size)
        .map(|rank| Process::start(command(settings, (rank, world_size), hub.address(), resume_from)))
        .collect();
    let killed_at = Mutex::new(None);
    let is_over = AtomicBool::new(false);
    let answered = |round: usize, answers: usize| {
        let Some(kill) = kill.filter(|kill| (kill.round, kill.answers) == (round, answers)) else { return };
        std::thread::sleep(kill.delay);
        *killed_at.lock().unwrap() = Some(Instant::now());
        match kill.rank {
            Some(rank) => ranks[rank].kill(),
            None => ranks.iter().for_each(Process::kill),
        }
    };
    let rounds = std::thread::scope(|scope| {
        let rounds = scope.spawn(|| hub.serve(world_size, &is_over, answered));
        let deadline = Instant::now() + PATIENCE;
        while !ranks.iter().all(Process::has_ended) {
            if Instant::now() > deadline {
                eprintln!("waited a minute for the ranks to end; they are killed");
                ranks.iter().for_each(Process::kill);
            }
            std::thread::sleep(POLL);
        }
        is_over.store(true, Ordering::Relaxed);
        rounds.join().unwrap()
    });
    let since_kill = killed_at.into_inner().unwrap().map(|at: Instant| at.elapsed());
    Ended { ranks: ranks.into_iter().map(Process::end).collect(), rounds, since_kill }
}

/// One rank alone, which nobody else waits for: for what is refused before ranks meet.
pub fn run_apart(settings: &Settings, rank: (usize, usize), resume_from: Option<u64>) -> End {
    let hub = Hub::bind();
    Process::start(command(settings, rank, hub.address(), resume_from)).end()
}

fn command(
    settings: &Settings,
    (rank, world_size): (usize, usize),
    hub: SocketAddr,
    resume_from: Option<u64>,
) -> Command {
    let mut command = Command::new(binary("rank"));
    command.args(["--bootstrap-servers", &settings.bootstrap_servers]);
    command.arg("--state").arg(&settings.state);
    command.args(["--rank", &rank.to_string(), "--world-size", &world_size.to_string()]);
    command.args(["--hub", &hub.to_string()]);
    command.args(settings.flags.iter().flat_map(|(flag, value)| [(*flag), value.as_str()]));
    command.args(resume_from.iter().flat_map(|step| ["--resume-from".to_owned(), step.to_string()]));
    command
}

/// The file of a rank's part of the checkpoint of a step.
pub fn checkpoint(state: &Path, step: u64, (rank, world_size): (usize, usize)) -> PathBuf {
    state.join(format!("step-{step}")).join(format!("rank-{rank}-of-{world_size}.safetensors"))
}

/// The files of a step's checkpoint, of all ranks that there were; nothing where one of them is missing.
pub fn whole_checkpoint(state: &Path, step: u64) -> Option<Vec<PathBuf>> {
    let of = |world_size| (0..world_size).map(move |rank| checkpoint(state, step, (rank, world_size)));
    [1, 2, 4, 8]
        .map(|world_size| of(world_size).collect())
        .into_iter()
        .find(|files: &Vec<PathBuf>| files.iter().all(|file| file.exists()))
}

/// The last step that all ranks have written their part of.
pub fn last_whole_checkpoint(state: &Path) -> Option<u64> {
    let folders = std::fs::read_dir(state).unwrap().map(|entry| entry.unwrap().file_name());
    let steps = folders.filter_map(|name| name.to_str()?.strip_prefix("step-")?.parse().ok());
    steps.filter(|&step| whole_checkpoint(state, step).is_some()).max()
}
