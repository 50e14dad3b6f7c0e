//! The daemon against a broker: every record that goes in comes out once, scored or dead-lettered.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::{BTreeMap, HashMap};
use std::process::Command;

use bytes::Bytes;
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::{ScoredDocument, TokenIds, TokenizedDocument};
use sluice_tests::{
    Broker, Daemon, Record, TRAP, golden, produce, python, read_all, root, write_greedy_model,
};

const MODEL: &str = "tiny-llama";

fn tokenizer() -> Fingerprint {
    Fingerprint::of_bytes(&std::fs::read(golden(MODEL).join("tokenizer.json")).unwrap())
}

fn document(id: &str, tokens: &[u32], tokenizer: Fingerprint) -> Bytes {
    TokenizedDocument {
        id: id.to_owned(),
        tokens: TokenIds::new(tokens),
        tokenizer,
        source: "test".to_owned(),
        attributes: BTreeMap::from([("lang".to_owned(), "en".to_owned())]),
    }
    .encode()
}

/// Golden documents under the ids `golden-0`, `golden-1`, …, with their losses.
fn golden_documents() -> Vec<(String, Vec<u32>, Vec<Option<f64>>)> {
    let json: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(golden("losses.json")).unwrap()).unwrap();
    let documents = json["models"][MODEL].as_array().unwrap().iter().enumerate();
    documents
        .map(|(index, document)| {
            let tokens = document["tokens"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32);
            let losses = document["losses"].as_array().unwrap().iter().map(serde_json::Value::as_f64);
            (format!("golden-{index}"), tokens.collect(), losses.collect())
        })
        .collect()
}

fn scored(records: &[Record]) -> HashMap<String, ScoredDocument> {
    let documents: Vec<_> = records
        .iter()
        .map(|record| ScoredDocument::decode(record.payload.clone().unwrap()).unwrap())
        .collect();
    let count = documents.len();
    let by_id: HashMap<_, _> =
        documents.into_iter().map(|document| (document.document.id.clone(), document)).collect();
    assert_eq!(by_id.len(), count, "no document leaves twice");
    by_id
}

#[test]
fn a_batch_that_exhausts_memory_is_halved_until_it_fits() {
    let model = tempfile::tempdir().unwrap();
    write_greedy_model(model.path());
    let broker = Broker::with_sluice_topics();
    let golden = golden_documents();
    let mut records: Vec<(String, Option<Bytes>)> =
        golden.iter().map(|(id, tokens, _)| (id.clone(), Some(document(id, tokens, tokenizer())))).collect();
    records.push(("greedy".to_owned(), Some(document("greedy", &[1, 2, TRAP, 3], tokenizer()))));
    let borrowed: Vec<_> = records.iter().map(|(key, payload)| (key.as_str(), payload.clone())).collect();
    produce(&broker.bootstrap_servers, "sluice.documents", &borrowed);

    // All of them in one batch, the trap among them.
    let flags =
        ["--score-stride-tokens", "32", "--batch-delay-ms-max", "5000", "--batch-tokens-max", "65536"];
    let daemon = Daemon::start(&broker.bootstrap_servers, model.path(), &flags);
    daemon.wait("all records", |daemon| daemon.finished() >= records.len());
    let splits = daemon.metric("sluiced_batches_out_of_memory_total");
    assert!(splits >= 2, "{splits} batches were halved because ONNX Runtime had no memory for them");
    assert_eq!(daemon.metric("sluiced_batches_split_total"), splits);
    assert!(daemon.stop().success());

    let scored = scored(&read_all(&broker.bootstrap_servers, "sluice.scored"));
    assert_eq!(scored.len(), records.len(), "none became a dead letter");
    for (id, _, losses) in &golden {
        for (ours, golden) in scored[id].reference_losses.iter().zip(losses).skip(1) {
            assert!((f64::from(ours) - golden.unwrap()).abs() < 2e-5, "{id}");
        }
    }
}

#[test]
fn documents_in_are_scored_plus_dead_lettered() {
    let broker = Broker::with_sluice_topics();
    let ours = tokenizer();
    let mut records: Vec<(String, Option<Bytes>)> = Vec::new();
    for (id, tokens, _) in golden_documents() {
        records.push((id.clone(), Some(document(&id, &tokens, ours))));
    }
    records.push(("one-token".to_owned(), Some(document("one-token", &[7], ours))));
    let half_a_megabyte = vec![3; 495_000];
    let whole = document("whole", &[1, 2, 3, 4, 5, 6, 7, 8], ours);
    let bad: Vec<(&str, &str, Option<Bytes>)> = vec![
        ("empty", "empty_document", Some(document("empty", &[], ours))),
        ("beyond", "token_beyond_vocabulary", Some(document("beyond", &[1, 512, 2], ours))),
        ("far-beyond", "token_beyond_vocabulary", Some(document("far-beyond", &[u32::MAX], ours))),
        ("foreign", "foreign_tokenizer", Some(document("foreign", &[1, 2], Fingerprint::of_bytes(b"other")))),
        ("truncated", "malformed", Some(whole.slice(..whole.len() / 2))),
        ("garbage", "malformed", Some(vec![0xff; 990_000].into())),
        ("tombstone", "empty_payload", None),
        // 990 kB of ids are taken; with four bytes of loss for each they are more than the broker allows.
        ("megabyte", "record_too_large", Some(document("megabyte", &half_a_megabyte, ours))),
    ];
    // Nothing but the origin is left of a record whose key alone is more than the broker allows.
    let huge_key = "k".repeat(2_000_000);
    records.push((huge_key, Some(Bytes::from_static(b"bad"))));
    records.extend(bad.iter().map(|(key, _, payload)| ((*key).to_owned(), payload.clone())));
    let borrowed: Vec<_> = records.iter().map(|(key, payload)| (key.as_str(), payload.clone())).collect();
    produce(&broker.bootstrap_servers, "sluice.documents", &borrowed);

    let daemon = Daemon::start(&broker.bootstrap_servers, &golden(MODEL), &["--score-stride-tokens", "32"]);
    daemon.wait("all records", |daemon| daemon.finished() >= records.len());
    assert_eq!(daemon.get("/live").0, 200);
    assert_eq!(daemon.get("/ready").0, 200);
    assert_eq!(daemon.metric("sluiced_documents_read_total"), records.len());
    let mut reasons: HashMap<&str, usize> = HashMap::new();
    for (_, reason, _) in &bad {
        *reasons.entry(reason).or_default() += 1;
    }
    *reasons.entry("malformed").or_default() += 1;
    for (reason, count) in reasons {
        assert_eq!(
            daemon.metric(&format!("sluiced_dead_letters_total{{reason=\"{reason}\"}}")),
            count,
            "{reason}"
        );
    }
    assert_eq!(daemon.stop().code(), Some(0));

    let losses = scored(&read_all(&broker.bootstrap_servers, "sluice.scored"));
    let letters = read_all(&broker.bootstrap_servers, "sluice.dead-letters");
    assert_eq!(losses.len() + letters.len(), records.len());
    for (id, tokens, golden) in golden_documents() {
        let scored = &losses[&id];
        assert_eq!(scored.document.tokens.to_vec(), tokens);
        assert_eq!(scored.document.attributes["lang"], "en");
        assert_eq!((scored.context.window, scored.context.stride), (64, 32));
        for (ours, golden) in scored.reference_losses.iter().zip(golden) {
            assert!(golden.is_none() && ours.is_nan() || (f64::from(ours) - golden.unwrap()).abs() < 1e-4);
        }
    }
    assert_eq!(losses["one-token"].reference_losses.to_vec().len(), 1);
    for (key, reason, payload) in &bad {
        let letter = letters.iter().find(|letter| letter.key.as_deref() == Some(key.as_bytes())).unwrap();
        assert_eq!(letter.headers["sluice-error"], *reason);
        assert_eq!(letter.headers["sluice-origin-topic"], "sluice.documents");
        assert_eq!(letter.payload, *payload, "{key}");
        assert!(!letter.headers.contains_key("sluice-omitted"));
    }
    let shrunk: Vec<_> =
        letters.iter().filter(|letter| letter.headers.contains_key("sluice-omitted")).collect();
    assert_eq!(shrunk.len(), 1);
    assert_eq!(shrunk[0].headers["sluice-omitted"], "payload, key");
    assert!(shrunk[0].key.is_none() && shrunk[0].payload.is_none());
    assert!(shrunk[0].headers.contains_key("sluice-origin-offset"));
}

#[test]
fn a_daemon_goes_on_where_the_last_one_stopped() {
    let broker = Broker::with_sluice_topics();
    let ours = tokenizer();
    let ids: Vec<String> = (0..300).map(|index| format!("document-{index}")).collect();
    let send = |ids: &[String]| {
        let records: Vec<_> =
            ids.iter().map(|id| (id.as_str(), Some(document(id, &[1, 2, 3, 4, 5, 6, 7], ours)))).collect();
        produce(&broker.bootstrap_servers, "sluice.documents", &records);
    };
    send(&ids[..200]);
    let first = Daemon::start(&broker.bootstrap_servers, &golden(MODEL), &[]);
    first.wait("the first documents", |daemon| daemon.finished() >= 50);
    assert_eq!(first.stop().code(), Some(0));
    send(&ids[200..]);
    let second = Daemon::start(&broker.bootstrap_servers, &golden(MODEL), &[]);
    let before = read_all(&broker.bootstrap_servers, "sluice.scored").len();
    second.wait("the rest", |daemon| daemon.finished() + before >= 300);
    assert_eq!(second.stop().code(), Some(0));

    // `scored` refuses doubles: nothing committed was read again.
    let records = read_all(&broker.bootstrap_servers, "sluice.scored");
    assert_eq!(scored(&records).len(), 300);
    // Order is kept: within a partition, documents come out as they went in.
    let mut last: HashMap<i32, usize> = HashMap::new();
    for record in &records {
        let id = String::from_utf8(record.key.clone().unwrap().to_vec()).unwrap();
        let index = ids.iter().position(|known| *known == id).unwrap();
        assert!(
            last.insert(record.partition, index).is_none_or(|before| before < index),
            "{id} is out of order"
        );
    }
}

#[test]
fn a_small_budget_pauses_reading_and_loses_nothing() {
    let broker = Broker::with_sluice_topics();
    let ours = tokenizer();
    let tokens: Vec<u32> = (0..100).collect();
    let ids: Vec<String> = (0..400).map(|index| format!("document-{index}")).collect();
    let records: Vec<_> = ids.iter().map(|id| (id.as_str(), Some(document(id, &tokens, ours)))).collect();
    produce(&broker.bootstrap_servers, "sluice.documents", &records);
    let flags =
        ["--limits-in-flight-tokens", "1000", "--batch-lookahead-tokens", "500", "--score-entropies", "true"];
    let daemon = Daemon::start(&broker.bootstrap_servers, &golden(MODEL), &flags);
    daemon.wait("all documents", |daemon| {
        assert!(daemon.metric("sluiced_in_flight_tokens") <= 1100, "the budget holds, but for one document");
        daemon.finished() >= 400
    });
    assert_eq!(daemon.stop().code(), Some(0));
    let scored = scored(&read_all(&broker.bootstrap_servers, "sluice.scored"));
    assert_eq!(scored.len(), 400);
    let entropies = scored["document-0"].reference_entropies.as_ref().unwrap().to_vec();
    assert!(entropies[0].is_nan() && entropies[1..].iter().all(|e| (0.0..6.3).contains(e)), "{entropies:?}");
}

#[test]
fn a_python_client_reads_scored_records_from_the_proto_alone() {
    let broker = Broker::with_sluice_topics();
    let (id, tokens, _) = golden_documents().remove(2);
    produce(
        &broker.bootstrap_servers,
        "sluice.documents",
        &[(&id, Some(document(&id, &tokens, tokenizer())))],
    );
    let daemon = Daemon::start(&broker.bootstrap_servers, &golden(MODEL), &[]);
    daemon.wait("the document", |daemon| daemon.finished() >= 1);
    daemon.stop();
    let ours = scored(&read_all(&broker.bootstrap_servers, "sluice.scored"));

    let output = Command::new(python())
        .arg(root().join("tests/python/read_scored.py"))
        .args(["--bootstrap-servers", &broker.bootstrap_servers, "--topic", "sluice.scored", "--count", "1"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let theirs: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let ours = &ours[&id];
    assert_eq!(theirs["id"], id);
    assert_eq!(theirs["tokens"], serde_json::json!(tokens));
    assert_eq!(theirs["tokenizer"], ours.document.tokenizer.to_string());
    assert_eq!(theirs["reference_model"], ours.reference_model.to_string());
    assert_eq!(theirs["window"], 64);
    assert_eq!(theirs["precision"], "PRECISION_F32");
    let losses: Vec<f64> = ours.reference_losses.iter().skip(1).map(f64::from).collect();
    assert_eq!(theirs["reference_loss"][0], serde_json::Value::Null);
    assert_eq!(
        theirs["reference_loss"].as_array().unwrap()[1..],
        *serde_json::json!(losses).as_array().unwrap()
    );
}
