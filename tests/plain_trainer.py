"""A training script as users have it, with plain Hugging Face parts; the five lines that keep the
guardrails are marked.

python -m tests.plain_trainer MODEL UNITS DATA.jsonl OUTPUT [BATCH]

In several processes: accelerate launch --num_processes 2 -m tests.plain_trainer ...
"""

import json
import sys
from pathlib import Path

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from ssah_utils import fingerprints, unit_files, unit_training  # 1


def main(model_folder: str, unit_file: str, data_file: str, output: str, batch: int = 4) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rows = [json.loads(line) for line in Path(data_file).read_text(encoding="utf-8").splitlines()]
    tokens = [tokenizer(f"{row['prompt']} {row['response']}").input_ids for row in rows]
    data = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in tokens])
    args = TrainingArguments(
        output_dir=output,
        max_steps=6,
        per_device_train_batch_size=int(batch),
        learning_rate=1e-2,
        weight_decay=0.1,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    frozen = unit_files.load_set(unit_file, fingerprints.fingerprint(model))  # 2
    with unit_training.freezing(model, frozen):  # 3
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=data,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
        )
        trainer.train()  # 4
        trainer.save_model(output)  # 5: an ordinary checkpoint


if __name__ == "__main__":
    main(*sys.argv[1:])
