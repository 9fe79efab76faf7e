"""Generate text with a Hugging Face transformers model whose experts are on expertd servers.

    expertd-server serve --checkpoint MODEL --experts 0-63 --port 50051 &
    expertd-server serve --checkpoint MODEL --experts 64-127 --port 50052 &
    python examples/transformers_generate.py MODEL localhost:50051 localhost:50052

Needs torch and transformers 5 beside expertd.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import expertd
from expertd.torch import remote_experts


def main(path: str, *targets: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    with expertd.ExpertGroup(targets) as group:
        names = remote_experts(model, group)
        print(f"{len(names)} layers are remote: {names[0]} to {names[-1]}")
        inputs = tokenizer("The answer to the ultimate question is", return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=64)
        print(tokenizer.decode(tokens[0], skip_special_tokens=True))
        for line in group.metrics_text().splitlines():
            if line.startswith("expertd_client_sent_bytes"):
                print(line)


if __name__ == "__main__":
    main(*sys.argv[1:])
