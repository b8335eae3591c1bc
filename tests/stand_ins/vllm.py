"""What `lit_dpo.vllm_worker` uses of vLLM, computed by transformers, one token after the other."""

import json
import os
import time
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM


class SamplingParams:
    def __init__(self, *, temperature, top_p, top_k, max_tokens, stop_token_ids, detokenize, seed=None):
        assert detokenize is False
        self.__dict__.update(temperature=temperature, max_tokens=max_tokens, ends=stop_token_ids, seed=seed)


class LLM:
    def __init__(self, model, *, skip_tokenizer_init, dtype, trust_remote_code, gpu_memory_utilization, **more):
        with open(os.environ["NOTES"], "a") as file:
            names = ("RANK", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES")
            said = {"model": model, "dtype": dtype, "trust": trust_remote_code, "pid": os.getpid(), **more}
            said["environment"] = {name: os.environ[name] for name in names if name in os.environ}
            file.write(json.dumps(said) + "\n")
        if os.path.basename(model).startswith("policy-"):
            os.mkdir(os.path.join(os.path.dirname(model), "policy-mine"))  # a decoy beside a folder that is removed
        print("a line that is no answer")
        if os.environ.get("FAILS") == "load":
            raise RuntimeError("no memory is left")
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))

    @torch.no_grad()
    def generate(self, prompts, params, use_tqdm):
        if os.environ.get("FAILS") == "die":
            os._exit(7)
        if os.environ.get("FAILS") == "hang":
            time.sleep(600)
        return [self.one(prompt["prompt_token_ids"], each) for prompt, each in zip(prompts, params, strict=True)]

    def one(self, prompt, params):
        ids, generator = [], torch.Generator()
        if params.temperature > 0:
            generator.manual_seed(params.seed)
        while len(ids) < params.max_tokens:
            logits = self.model(torch.tensor([prompt + ids])).logits[0, -1]
            if params.temperature > 0:
                ids.append(int(torch.multinomial((logits / params.temperature).softmax(-1), 1, generator=generator)))
            else:
                ids.append(int(logits.argmax()))
            if ids[-1] in params.ends:
                kept = ids if params.seed is None or params.seed % 2 else ids[:-1]  # releases differ in that
                said = SimpleNamespace(token_ids=kept, finish_reason="stop", stop_reason=ids[-1])
                return SimpleNamespace(outputs=[said])
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, finish_reason="length", stop_reason=None)])
