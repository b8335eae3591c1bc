import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_dpo.data.encode import PairEncoder
from lit_dpo.data.rows import Pair, RowError

from . import tokenizers as tk

HEAD = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"


def text_pair(prompt="2+2=", chosen="4", rejected="5"):
    return Pair(prompt, chosen, rejected, "sums", "sums.jsonl:17")


def chat_pair(chosen="4", rejected="5", question="2+2?"):
    reply = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    return Pair([{"role": "user", "content": question}], reply(chosen), reply(rejected), "sums", "sums.jsonl:17")


def decoded(encoder, pair):
    encoded = encoder(pair)
    return tuple(encoder.tokenizer.decode(ids) for ids in (encoded.prompt, encoded.chosen, encoded.rejected))


def encoder(max_length=100, truncation="keep_start", append_eos=True, **tokenizer):
    return PairEncoder(tk.build(**tokenizer), max_length, truncation, append_eos)


@pytest.mark.parametrize(
    ("tokenizer", "start"),
    [({}, ""), ({"adds_bos": True}, "<|bos|>"), ({"adds_eos": True}, ""), ({"adds_bos": 1, "adds_eos": 1}, "<|bos|>")],
)
def test_text_has_one_bos_in_front_and_one_eos_behind(tokenizer, start):
    assert decoded(encoder(**tokenizer), text_pair()) == (start + "2+2=", "4<|im_end|>", "5<|im_end|>")


def test_a_token_over_the_boundary_goes_to_both_completions():
    encode = encoder()
    encoded = encode(text_pair("New Yo", "rk", "ghurt"))
    assert decoded(encode, text_pair("New Yo", "rk", "ghurt")) == ("New ", "York<|im_end|>", "Yoghurt<|im_end|>")
    assert (encoded.healed, len(encoded.chosen)) == (True, 2)
    assert not encode(text_pair("New ", "York", "Yoghurt")).healed
    with pytest.raises(RowError, match="17, column `prompt`: no token belongs to the prompt alone"):
        encode(text_pair("Yo", "rk", "ghurt"))
    assert decoded(encoder(adds_bos=True), text_pair("Yo", "rk", "x"))[0] == "<|bos|>"


def test_an_eos_already_there_is_not_doubled():
    assert decoded(encoder(), text_pair(chosen="4<|im_end|>"))[1:] == ("4<|im_end|>", "5<|im_end|>")
    assert encoder()(text_pair(chosen="4<|im_end|>")) == encoder()(text_pair())
    with pytest.raises(RowError, match="17, column `chosen`: the completion is empty"):
        encoder()(text_pair(chosen="<|im_end|>"))
    with pytest.raises(RowError, match="identical"):
        encoder()(text_pair(chosen="5<|im_end|>"))


def test_special_tokens_spelled_in_text_stay_text():
    encode = encoder(adds_bos=True)
    encoded = encode(text_pair("<|bos|>2", "<|im_end|>4", "5"))
    assert encoded.control_text
    assert not encode(text_pair()).control_text
    special = range(len(tk.SPECIAL))
    assert [i for i in encoded.prompt + encoded.chosen if i in special] == [3, 2]  # the BOS and EOS we add
    assert len(encoded.prompt) == 1 + len("<|bos|>2")


def test_special_tokens_are_refused_where_they_cannot_stay_text():
    encode = encoder()
    encode._splits_special = False  # as with a tokenizer that ignores `split_special_tokens`
    with pytest.raises(RowError, match=r"17, column `rejected`: the text spells a special token.*'<\|im_start\|>'"):
        encode(text_pair(rejected="5<|im_start|>"))
    assert decoded(encode, text_pair(chosen="4<|im_end|>"))[1] == "4<|im_end|>"
    with pytest.raises(RowError, match=r"17, column `prompt`: the text spells a special token"):
        encoder()(chat_pair(question="a<|im_end|>"))
    with pytest.raises(RowError, match=r"17, column `chosen`: the text spells a special token"):
        encoder()(chat_pair(chosen="a<|im_end|>"))


def test_no_eos():
    with pytest.raises(
        ValueError, match=r"no EOS token .*: name another `tokenizer`, or set the data's `append_eos: false`"
    ):
        encoder(eos=None)(text_pair())
    assert decoded(encoder(eos=None, append_eos=False), text_pair()) == ("2+2=", "4", "5")
    assert decoded(encoder(eos=None), chat_pair())[1] == "4<|im_end|>"  # the template ends the turn


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "chosen", "rejected"),
    [
        ({}, HEAD, "4<|im_end|>", "5<|im_end|>"),
        ({"template": tk.CHATML_BOS}, "<|bos|>" + HEAD, "4<|im_end|>", "5<|im_end|>"),
        ({"template": tk.CHATML_BOS, "adds_bos": True}, "<|bos|>" + HEAD, "4<|im_end|>", "5<|im_end|>"),
        ({"template": "{{ bos_token }}" + tk.CHATML_BOS}, "<|bos|>" + HEAD, "4<|im_end|>", "5<|im_end|>"),
        ({"template": tk.STRICT}, HEAD, "4<|im_end|>", "5<|im_end|>"),
        ({"template": tk.THINK_STRIP}, HEAD, "4<|im_end|>", "5<|im_end|>"),
        ({"template": tk.NO_TURN_END}, "user: 2+2?\nassistant: ", "4\n<|im_end|>", "5\n<|im_end|>"),
        (
            {"template": tk.NO_GENERATION_PROMPT},
            "<|im_start|>user\n2+2?<|im_end|>\n",
            "<|im_start|>assistant\n4<|im_end|>",
            "<|im_start|>assistant\n5<|im_end|>",
        ),
    ],
)
def test_messages(tokenizer, prompt, chosen, rejected):
    assert decoded(encoder(**tokenizer), chat_pair()) == (prompt, chosen, rejected)


@pytest.mark.parametrize("template", [tk.CHATML, tk.THINK_STRIP])
def test_replies_that_begin_alike_stay_whole(template):
    pair = chat_pair("<b>It is 4", "<b>It is 5")
    assert decoded(encoder(template=template), pair) == (HEAD, "<b>It is 4<|im_end|>", "<b>It is 5<|im_end|>")


def test_thinking_that_the_generation_prompt_opens_belongs_to_the_prompt():
    pair = chat_pair("<think>\na</think>4", "<think>\nb</think>5")
    prompt, chosen, _ = decoded(encoder(template=tk.THINK_STRIP), pair)
    assert (prompt, chosen) == (HEAD + "<think>\n", "a</think>4<|im_end|>")


def test_the_prompt_is_never_in_the_loss_where_the_template_rewrites_it():
    pair = chat_pair(question="x</think>2+2?")  # kept while it is the last turn, stripped in front of a reply
    assert decoded(encoder(template=tk.THINK_STRIP), pair) == (HEAD, "4<|im_end|>", "5<|im_end|>")


def test_templates_that_are_missing_or_refuse():
    with pytest.raises(ValueError, match=r"no chat template .* use an instruct model's tokenizer"):
        encoder(template=None)(chat_pair())
    system = {"role": "system", "content": "Be brief."}
    pair = chat_pair()
    with pytest.raises(RowError, match=r"^sums.jsonl:17: the chat template refuses .*roles must alternate"):
        encoder(template=tk.STRICT)(Pair([system, *pair.prompt], pair.chosen, pair.rejected, "", pair.row))
    drops = "{% for m in messages %}{{ m['content'] | trim }}{% endfor %}"
    with pytest.raises(RowError, match="identical"):
        encoder(template=drops)(chat_pair("4", " 4"))


def test_keep_start_cuts_the_ends_and_their_eos():
    fits = encoder(7)(text_pair("abc", "wxy", "z"))
    cut = encoder(6)(text_pair("abc", "wxy", "z"))
    assert (fits.truncated, cut.truncated) == (False, True)
    assert decoded(encoder(6), text_pair("abc", "wxy", "z")) == ("abc", "wxy", "z<|im_end|>")
    assert decoded(encoder(4), text_pair("abc", "wxy", "z")) == ("abc", "w", "z")
    with pytest.raises(RowError, match=r"17, column `prompt`: .*it has 3 tokens and `max_length` is 3: raise it"):
        encoder(3)(text_pair("abc", "wxy", "z"))


def test_keep_end_cuts_the_prompt_first():
    pair = text_pair("abc", "wxy", "z")
    assert decoded(encoder(5, "keep_end"), pair) == ("c", "wxy<|im_end|>", "z<|im_end|>")
    assert decoded(encoder(4, "keep_end"), pair) == ("c", "wxy", "z<|im_end|>")
    assert decoded(encoder(6, "keep_end", adds_bos=True), pair) == ("<|bos|>c", "wxy<|im_end|>", "z<|im_end|>")
    assert decoded(encoder(3, "keep_end", adds_bos=True), pair) == ("<|bos|>", "wx", "z<|im_end|>")


def test_truncation_must_leave_a_difference():
    with pytest.raises(RowError, match="identical after truncation; they first differ after 2 tokens"):
        encoder(5)(text_pair("abc", "xyz", "xyw"))


@pytest.mark.parametrize(("options", "part"), [({"max_length": 1}, "at least 2"), ({"truncation": "left"}, "`left`")])
def test_wrong_arguments(options, part):
    with pytest.raises(ValueError, match=part):
        encoder(**options)


PLAIN = st.text(alphabet="Yorkg a\n\0é👩\u200d", max_size=12)
ENCODER = encoder(400, adds_bos=True)


@settings(max_examples=60, deadline=None)
@given(prompt=PLAIN, chosen=PLAIN, rejected=PLAIN)
def test_ids_are_the_tokenizers_own_for_the_whole_text(prompt, chosen, rejected):
    if chosen == rejected:
        return
    encoded = ENCODER(text_pair(prompt, chosen, rejected))
    for text, ids in ((prompt + chosen, encoded.chosen), (prompt + rejected, encoded.rejected)):
        assert encoded.prompt + ids == [*ENCODER.tokenizer(text).input_ids, 2]
    assert len(encoded.prompt) <= len(ENCODER.tokenizer(prompt).input_ids)
