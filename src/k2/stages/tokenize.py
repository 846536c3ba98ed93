"""Stage `tokenize`: train the tokenizer and turn documents into token arrays."""

import json

from k2.config.tokenize import TokenizeConfig
from k2.data.tokenization import token_examples, train_tokenizer, write_tokens, write_training_tokens
from k2.execution.contract import Progress, StageResult
from k2.store.artifacts import Artifact, ArtifactWriter


def run(
    config: TokenizeConfig, inputs: dict[str, Artifact], output: ArtifactWriter, *, progress: Progress
) -> StageResult:
    """Write `tokenizer/`, `train/` (shards by domain), `heldout/` (`tokens.npy`, `offsets.npy`), and `report.json`.

    Inputs `documents` (rephrase) and `heldout` (ingest). The tokenizer never sees held-out text.
    """
    documents = inputs["documents"].path("documents.jsonl.zst")
    heldout = inputs["heldout"].path("heldout.jsonl.zst")
    progress.update(0, 3, "steps", step="training the tokenizer")
    tokenizer = train_tokenizer(documents, config)
    tokenizer.save(output.path("tokenizer/tokenizer.json").parent)
    progress.update(1, 3, "steps", step="encoding the documents")
    train = write_training_tokens(documents, tokenizer, output.path("train/index.json").parent, config.shard_tokens)
    progress.update(2, 3, "steps", step="encoding the held-out documents")
    held = write_tokens(heldout, tokenizer, output.path("heldout/tokens.npy").parent)
    progress.update(3, 3, "steps")
    metrics = {
        "vocab_size": tokenizer.vocab_size,
        "train_tokens": train["tokens"],
        "heldout_tokens": held["tokens"],
        "bytes_per_token": round(train["bytes"] / train["tokens"], 4),
        "heldout_bytes_per_token": round(held["bytes"] / held["tokens"], 4),
    }
    report = {**metrics, "examples": token_examples(tokenizer, documents), "special": tokenizer.special}
    output.path("report.json").write_text(json.dumps(report, indent=1, sort_keys=True), encoding="utf-8")
    return StageResult(output.publish(**metrics, train=train, heldout=held))
