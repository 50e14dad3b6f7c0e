//! How well documents of real text fill rows: by best fit, for look-aheads of 1 to 64 rows, and in the order of the stream as
//! they did before. Prints one JSON object on standard output.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use clap::Parser;
use serde_json::json;
use sluice_benches::packing::{
    Filled, by_best_fit, dealt, in_stream_order, piece_lengths, rows_min, tokens_a_cpu_second,
};
use sluice_feed::document::Document;
use sluice_feed::pack::ROWS_AHEAD;
use sluice_schemas::record::{Bos, ContextPolicy};
use sluice_text::output::{print_line, say};
use sluice_text::{Fields, Format, TEXT_BYTES_MAX, TOKENS_MAX, TextReader};
use sluice_trainer::text::TextTokenizer;

const LOOK_AHEADS: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];

/// Measures how well documents fill rows.
#[derive(Debug, Parser)]
struct Arguments {
    /// JSON Lines with a field "text".
    #[arg(required = true)]
    texts: Vec<PathBuf>,
    /// A tokenizer.json.
    #[arg(long)]
    tokenizer: PathBuf,
    /// Tokens of a row; may be several.
    #[arg(long, value_delimiter = ',', default_value = "256")]
    len: Vec<usize>,
    /// The reference's window in tokens, at most a row's; 0 for as long as a row; may be several. Windows start every three
    /// quarters of one, as in experiment 1.
    #[arg(long, value_delimiter = ',', default_value = "0")]
    window: Vec<usize>,
    /// Partitions that the documents are spread over, each of which is packed by itself.
    #[arg(long, default_value_t = 8)]
    partitions: usize,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    ensure!(arguments.partitions > 0, "--partitions must be 1 or more");
    let tokenizer = TextTokenizer::read(&arguments.tokenizer)?;
    let mut documents = Vec::new();
    for path in &arguments.texts {
        read(path, &tokenizer, &mut documents)?;
    }
    let mut shapes = Vec::new();
    for &len in &arguments.len {
        for window in arguments.window.iter().map(|&window| if window == 0 { len } else { window }) {
            ensure!(window >= 4 && window <= len, "a window of {window} tokens for rows of {len}");
            if !shapes.contains(&(len, window)) {
                shapes.push((len, window));
            }
        }
    }
    let mut cases = Vec::new();
    for (len, window) in shapes {
        cases.push(measure(&documents, arguments.partitions, len, window)?);
    }
    let result = json!({
        "command": std::env::args().collect::<Vec<_>>().join(" "),
        "documents": documents.len(),
        "tokens": documents.iter().map(Vec::len).sum::<usize>(),
        "partitions": arguments.partitions,
        "rows_ahead": ROWS_AHEAD,
        "cases": cases,
    });
    print_line(&serde_json::to_string_pretty(&result)?)?;
    Ok(())
}

fn read(path: &Path, tokenizer: &TextTokenizer, into: &mut Vec<Vec<u32>>) -> anyhow::Result<()> {
    let reader =
        TextReader { format: Format::Jsonl, fields: Fields::default(), text_bytes_max: TEXT_BYTES_MAX };
    for document in reader.open(path, |raw| raw).with_context(|| format!("cannot read {}", path.display()))? {
        into.push(tokenizer.encode(&document?.text, TOKENS_MAX)?);
    }
    Ok(())
}

fn measure(
    documents: &[Vec<u32>],
    partitions: usize,
    len: usize,
    window: usize,
) -> anyhow::Result<serde_json::Value> {
    let stride = window * 3 / 4;
    let context = ContextPolicy { window: window as u32, stride: stride as u32, bos: Bos::None };
    let mut scored = Vec::with_capacity(documents.len());
    for (number, tokens) in documents.iter().enumerate() {
        let losses = vec![1.0; tokens.len()];
        let document = Document::scored(number.to_string(), String::new(), tokens.clone(), losses)?;
        scored.push(document.with_context(context));
    }
    let fitting = documents.iter().filter(|tokens| tokens.len() <= window).count();
    let lanes = dealt(scored, partitions);
    let figures = |filled: Filled| {
        let cells = |rows: usize| (rows * len) as f64;
        json!({
            "cut_share_of_fitting_documents": filled.documents_cut as f64 / fitting as f64,
            "rows": filled.rows,
            "padding_share": filled.padding as f64 / cells(filled.rows),
            "padding_share_before_end": filled.padding_before_end as f64 / cells(filled.rows_before_end),
            "predictions_a_cell": filled.predictions as f64 / cells(filled.rows),
            "tokens_held_max": filled.tokens_held_max,
        })
    };
    let pieces = piece_lengths(&lanes, len);
    let least = rows_min(&pieces, len) * len;
    let mut best_fit = Vec::new();
    for rows_ahead in LOOK_AHEADS {
        let mut one = figures(by_best_fit(&lanes, len, rows_ahead));
        one["rows_ahead"] = rows_ahead.into();
        one["tokens_a_cpu_second"] = tokens_a_cpu_second(&lanes, len, rows_ahead)?.into();
        say(format_args!("rows of {len}, windows of {window}, {rows_ahead} rows ahead: {one}"));
        best_fit.push(one);
    }
    Ok(json!({
        "len": len,
        "window": window,
        "stride": stride,
        "share_of_documents_longer_than_a_window": 1.0 - fitting as f64 / documents.len() as f64,
        "share_of_pieces_that_fill_a_row": share(&pieces, |piece| piece == len),
        "share_of_pieces_over_half_a_row": share(&pieces, |piece| piece > len / 2 && piece < len),
        "padding_share_min_of_any_packing": 1.0 - pieces.iter().sum::<usize>() as f64 / least as f64,
        "in_stream_order": figures(in_stream_order(&lanes, len, window)),
        "best_fit": best_fit,
    }))
}

fn share(pieces: &[usize], holds: impl Fn(usize) -> bool) -> f64 {
    pieces.iter().filter(|&&piece| holds(piece)).count() as f64 / pieces.len() as f64
}
