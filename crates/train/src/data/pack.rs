//! Sequences of fixed length cut from the shards, with the borders of documents kept.
//!
//! A sequence is filled to the last token; a document may go on in another sequence, where it
//! counts as a document of its own. No token attends or predicts across a border.
//! Read next: `order.rs`.

use std::path::{Path, PathBuf};

use pontoon_ops::IGNORED;

use super::{DataError, Shard, order::sequence_at};

/// Which sequence stands at which position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// As in the shards: for validation.
    Sequential,
    /// Shuffled anew every epoch.
    Shuffled {
        /// Decides all epochs.
        seed: u64,
    },
}

/// Token sequences to train or validate on.
#[derive(Debug)]
pub struct Dataset {
    shards: Vec<Shard>,
    /// Tokens before each shard, and at the end of all.
    starts: Vec<usize>,
    sequence: usize,
    order: Order,
}

/// Sequences as the model's programs take them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// The tokens.
    pub ids: Vec<i32>,
    /// The token after each, [`IGNORED`] at the end of a document.
    pub targets: Vec<i32>,
    /// Places within the documents.
    pub positions: Vec<i32>,
    /// The first row of each document, then the number of rows up to the capacity, rows + 1.
    pub documents: Vec<i32>,
    /// Targets that count.
    pub valid: usize,
}

/// Documents that fill a batch, all equally long.
#[derive(Clone, Copy, Debug)]
pub struct WholeDocuments {
    /// How many.
    pub count: usize,
    /// Tokens of each.
    pub tokens: usize,
}

impl Batch {
    /// A batch of made-up documents, to measure with: in row `n` stands `token(n)`.
    pub fn of(documents: WholeDocuments, token: impl Fn(usize) -> i32) -> Batch {
        let WholeDocuments { count, tokens } = documents;
        let rows = count * tokens;
        Batch {
            ids: (0..rows).map(&token).collect(),
            targets: (1..=rows).map(&token).collect(),
            positions: (0..rows).map(|row| (row % tokens) as i32).collect(),
            documents: (0..=rows).map(|at| (at.min(count) * tokens) as i32).collect(),
            valid: rows,
        }
    }
}

impl Dataset {
    /// Opens shards made with a tokenizer of `vocabulary` ids. Patterns may hold `*` and `?`;
    /// relative ones are looked up in `base`.
    pub fn open(
        patterns: &[String],
        base: &Path,
        cut: Cut,
        order: Order,
    ) -> Result<Dataset, DataError> {
        let paths = find(patterns, base)?;
        let shards = paths.iter().map(|path| Shard::open(path)).collect::<Result<Vec<_>, _>>()?;
        let Cut { vocabulary, sequence } = cut;
        if let Some(shard) = shards.iter().find(|shard| shard.vocabulary() != vocabulary) {
            let (path, got) = (shard.path().to_owned(), shard.vocabulary());
            return Err(DataError::Vocabulary { path, want: vocabulary, got });
        }
        let mut starts = vec![0];
        for shard in &shards {
            starts.push(starts[starts.len() - 1] + shard.tokens());
        }
        let dataset = Dataset { shards, starts, sequence, order };
        if dataset.sequences() == 0 {
            let what = format!(
                "{} hold {} tokens, less than one sequence of {sequence}; add data or lower \
                 data.sequence",
                patterns.join(", "),
                dataset.tokens()
            );
            return Err(DataError::Empty { what });
        }
        Ok(dataset)
    }

    /// Whole sequences in one epoch.
    pub fn sequences(&self) -> u64 {
        (self.tokens() / self.sequence) as u64
    }

    /// Tokens of all shards.
    pub fn tokens(&self) -> usize {
        self.starts[self.starts.len() - 1]
    }

    /// Documents of all shards.
    pub fn documents(&self) -> usize {
        self.shards.iter().map(Shard::documents).sum()
    }

    /// Fills a batch with the `count` sequences from `position` on; after the last sequence the
    /// next epoch begins. Allocates nothing when the batch has held as many before.
    pub fn batch(&self, position: u64, count: usize, batch: &mut Batch) {
        batch.clear();
        for index in 0..count as u64 {
            let (epoch, place) =
                ((position + index) / self.sequences(), (position + index) % self.sequences());
            let sequence = match self.order {
                Order::Sequential => place,
                Order::Shuffled { seed } => sequence_at(seed, epoch, self.sequences(), place),
            };
            self.append(sequence as usize, batch);
        }
        let rows = batch.ids.len();
        batch.documents.resize(rows + 1, rows as i32);
    }

    /// Appends one sequence, document piece by document piece.
    fn append(&self, sequence: usize, batch: &mut Batch) {
        let (mut at, end) = (sequence * self.sequence, (sequence + 1) * self.sequence);
        while at < end {
            let index = self.starts.partition_point(|&start| start <= at) - 1;
            let (shard, start) = (&self.shards[index], self.starts[index]);
            let document_end = start + shard.document_end(shard.document_of(at - start));
            let piece = at..end.min(document_end);
            batch.documents.push(batch.ids.len() as i32);
            for token in piece.clone() {
                batch.ids.push(shard.token(token - start) as i32);
                batch.positions.push((token - piece.start) as i32);
                let next = token + 1;
                let target = if next < document_end {
                    batch.valid += 1;
                    shard.token(next - start) as i32
                } else {
                    IGNORED
                };
                batch.targets.push(target);
            }
            at = piece.end;
        }
    }
}

/// How a token stream is cut.
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    /// Ids of the tokenizer.
    pub vocabulary: usize,
    /// Tokens of a sequence.
    pub sequence: usize,
}

impl Batch {
    fn clear(&mut self) {
        self.ids.clear();
        self.targets.clear();
        self.positions.clear();
        self.documents.clear();
        self.valid = 0;
    }
}

/// The files that patterns stand for, in the patterns' and then the names' order.
fn find(patterns: &[String], base: &Path) -> Result<Vec<PathBuf>, DataError> {
    let empty = |what: String| DataError::Empty { what };
    if patterns.is_empty() {
        return Err(empty(
            "there is no data to train on; set data.train to shards made with `pontoon data \
             prepare`"
                .to_owned(),
        ));
    }
    let mut paths = Vec::new();
    for pattern in patterns {
        let full = base.join(pattern);
        let found = glob::glob(&full.to_string_lossy())
            .map_err(|error| empty(format!("`{pattern}` is no pattern of files: {error}")))?;
        let before = paths.len();
        paths.extend(found.filter_map(Result::ok));
        if paths.len() == before {
            return Err(empty(format!(
                "no file matches `{}`; make shards with `pontoon data prepare`",
                full.display()
            )));
        }
    }
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::ShardWriter;

    /// Two shards; documents 0..7, 7..9, 9..10 and 10..17 of tokens 0, 1, 2, ...
    fn dataset(sequence: usize, order: Order) -> (tempfile::TempDir, Result<Dataset, DataError>) {
        let folder = tempfile::tempdir().unwrap();
        for (name, borders) in [("a.bin", [0, 7, 9, 10].as_slice()), ("b.bin", &[10, 17])] {
            let mut writer = ShardWriter::create(&folder.path().join(name), 100).unwrap();
            for pair in borders.windows(2) {
                writer.push(&(pair[0]..pair[1]).collect::<Vec<u32>>()).unwrap();
            }
            writer.finish().unwrap();
        }
        let cut = Cut { vocabulary: 100, sequence };
        let dataset = Dataset::open(&["*.bin".to_owned()], folder.path(), cut, order);
        (folder, dataset)
    }

    #[test]
    fn sequences_keep_the_borders_of_documents() {
        let (_folder, dataset) = dataset(8, Order::Sequential);
        let dataset = dataset.unwrap();
        assert_eq!((dataset.sequences(), dataset.documents()), (2, 4));
        let mut batch = Batch::default();
        dataset.batch(0, 2, &mut batch);
        assert_eq!(batch.ids, (0..16).collect::<Vec<i32>>());
        let end = IGNORED;
        let targets = [1, 2, 3, 4, 5, 6, end, 8, end, end, 11, 12, 13, 14, 15, 16];
        assert_eq!(batch.targets, targets);
        assert_eq!(batch.positions, [0, 1, 2, 3, 4, 5, 6, 0, 0, 0, 0, 1, 2, 3, 4, 5]);
        let starts = [0, 7, 8, 9, 10, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16];
        assert_eq!(batch.documents, starts);
        assert_eq!(batch.valid, 13);
    }

    #[test]
    fn a_batch_at_any_position_is_part_of_the_whole_order() {
        let (_folder, dataset) = dataset(2, Order::Shuffled { seed: 3 });
        let dataset = dataset.unwrap();
        let (mut all, mut one) = (Batch::default(), Batch::default());
        dataset.batch(0, 24, &mut all);
        for position in 0..24 {
            dataset.batch(position, 1, &mut one);
            assert_eq!(one.ids, all.ids[2 * position as usize..][..2]);
        }
        let mut firsts: Vec<i32> = all.ids[..16].iter().step_by(2).copied().collect();
        firsts.sort_unstable();
        assert_eq!(firsts, [0, 2, 4, 6, 8, 10, 12, 14]);
    }

    #[test]
    fn too_little_data_and_another_tokenizer_are_named() {
        let (folder, short) = dataset(18, Order::Sequential);
        assert!(short.unwrap_err().to_string().contains("17 tokens"));
        let open = |patterns: &[&str], vocabulary| {
            let patterns: Vec<String> = patterns.iter().map(|&p| p.to_owned()).collect();
            let cut = Cut { vocabulary, sequence: 4 };
            let dataset = Dataset::open(&patterns, folder.path(), cut, Order::Sequential);
            dataset.unwrap_err().to_string()
        };
        assert!(open(&["a.bin"], 99).contains("a.bin` was made for 100 tokens"));
        assert!(open(&["c*.bin"], 100).contains("c*.bin"));
        assert!(open(&[], 100).contains("data.train"));
    }
}
