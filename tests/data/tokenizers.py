"""Small tokenizers built in code: one id per byte, and just the merges that the tests need."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|bos|>")
TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
CHATML = TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML_BOS = "{{ bos_token }}" + CHATML
NO_GENERATION_PROMPT = TURNS
NO_TURN_END = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
THINK_STRIP = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHATML
)


def build(
    template: str | None = CHATML, eos: str | None = "<|im_end|>", adds_bos: bool = False, adds_eos: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose only merges are Y+o, r+k and Yo+rk."""
    merges = [("Y", "o"), ("r", "k"), ("Yo", "rk")]
    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    ends = ["<|bos|>"] * adds_bos, ["<|im_end|>"] * adds_eos
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*ends[0], "$A", *ends[1]], special_tokens=[(token, SPECIAL.index(token)) for token in SPECIAL]
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token=eos)
    wrapped.chat_template = template
    return wrapped
