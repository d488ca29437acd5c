//! The same texts in every format become the same tokens, and come back as the same texts.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use pontoon_train::data::{Import, Prepare, Shard, train_tokenizer};

fn texts() -> Vec<String> {
    (0..300).map(|n| format!("Line {n} of the tests: é, 好 and \"quotes\" {}.", n * n)).collect()
}

fn write_parquet(path: &Path, texts: &[String]) {
    let schema =
        Arc::new(parse_message_type("message m { required binary text (UTF8); }").unwrap());
    let file = std::fs::File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, Arc::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    let values: Vec<ByteArray> = texts.iter().map(|text| text.as_str().into()).collect();
    column.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    writer.close().unwrap();
}

fn tokens(folder: &Path, input: &str) -> (Vec<u32>, usize) {
    let input = folder.join(input).display().to_string();
    let import = Import::open(&[input], "text", 0).unwrap();
    let out = tempfile::tempdir().unwrap();
    let tokenizer = folder.join("tokenizer.json");
    let prepare =
        Prepare { import: &import, tokenizer: &tokenizer, out: out.path(), valid_fraction: 0.0 };
    let prepared = prepare.run().unwrap();
    let shard = Shard::open(&out.path().join("shard-00000.bin")).unwrap();
    shard.verify().unwrap();
    assert_eq!(prepared.tokens, shard.tokens() as u64);
    ((0..shard.tokens()).map(|index| shard.token(index)).collect(), shard.documents())
}

#[test]
fn every_format_gives_the_same_tokens_and_the_tokens_give_the_texts() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let texts = texts();
    let lines: Vec<String> =
        texts.iter().map(|text| serde_json::json!({ "text": text }).to_string()).collect();
    let jsonl = lines.join("\n");
    std::fs::write(folder.join("a.jsonl"), &jsonl).unwrap();
    let file = std::fs::File::create(folder.join("a.jsonl.gz")).unwrap();
    let mut gzip = flate2::write::GzEncoder::new(file, flate2::Compression::default());
    gzip.write_all(jsonl.as_bytes()).unwrap();
    gzip.finish().unwrap();
    std::fs::write(folder.join("a.jsonl.zst"), zstd::encode_all(jsonl.as_bytes(), 3).unwrap())
        .unwrap();
    write_parquet(&folder.join("a.parquet"), &texts);
    std::fs::create_dir(folder.join("files")).unwrap();
    for (index, text) in texts.iter().enumerate() {
        let ending = if index % 2 == 0 { "txt" } else { "md" };
        std::fs::write(folder.join(format!("files/{index:04}.{ending}")), text).unwrap();
    }
    let import = Import::open(&[folder.join("a.jsonl").display().to_string()], "text", 0).unwrap();
    let path = folder.join("tokenizer.json");
    let trained = train_tokenizer(&import, 320, &path).unwrap();
    assert!((270..=320).contains(&trained.vocabulary), "{} tokens", trained.vocabulary);

    let (plain, documents) = tokens(folder, "a.jsonl");
    assert_eq!(documents, texts.len());
    for other in ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "files"] {
        assert_eq!(tokens(folder, other), (plain.clone(), documents), "{other}");
    }
    // The library's own decoder is the judge.
    let tokenizer = tokenizers::Tokenizer::from_file(&path).unwrap();
    let text = tokenizer.decode(&plain, false).unwrap();
    assert_eq!(text, texts.join("<|endoftext|>") + "<|endoftext|>");

    let first = std::fs::read(&path).unwrap();
    let import = Import::open(&[folder.join("a.jsonl").display().to_string()], "text", 0).unwrap();
    train_tokenizer(&import, 320, &path).unwrap();
    assert!(first == std::fs::read(&path).unwrap(), "training again gives the same tokenizer");
}
