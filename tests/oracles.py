"""Slow and obvious versions of what the package does fast, written without its code."""

import torch


def sees(shape):
    """Which token of the line ``[P C R]...`` may look at which, from the words of the rule, token by token."""
    tokens = []
    for pair, sizes in enumerate(shape):
        for branch, size in zip("PCR", sizes, strict=True):
            tokens += [(pair, branch)] * size
    rows = []
    for query, (query_pair, query_branch) in enumerate(tokens):
        row = []
        for key, (key_pair, key_branch) in enumerate(tokens):
            own = key_branch == "P" or key_branch == query_branch
            row.append(key <= query and key_pair == query_pair and own)
        rows.append(row)
    return torch.tensor(rows)


def dense_attention(query, key, value, allowed, scale=None, softcap=None):
    """Attention with a dense mask, one head and one query at a time."""
    _, heads, tokens, width = query.shape
    group = heads // key.shape[1]
    scale = width**-0.5 if scale is None else scale
    out = []
    for head in range(heads):
        for place in range(tokens):
            keys = key[0, head // group][allowed[place]]
            scores = torch.stack([scale * (query[0, head, place] * k).sum() for k in keys])
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.exp() / scores.exp().sum()
            out.append((weights[:, None] * value[0, head // group][allowed[place]]).sum(0))
    return torch.stack(out).view(1, heads, tokens, -1)


def separate_logps(model, pairs, block=None):
    """Log-probs of chosen and rejected, shape (batch,) each, from the model's own logits, one sequence at a time.

    With ``block``, the logits are those of the output of that decoder block, put through final norm and head by hand.
    """
    chosen = [_one_logp(model, prompt, completion, block) for prompt, completion, _ in pairs]
    rejected = [_one_logp(model, prompt, completion, block) for prompt, _, completion in pairs]
    return torch.stack(chosen), torch.stack(rejected)


def _one_logp(model, prompt, completion, block):
    out = model(torch.tensor([[*prompt, *completion]]), use_cache=False, output_hidden_states=block is not None)
    logits = out.logits[0]
    if block is not None and block < model.config.num_hidden_layers:  # the last entry is the output itself, normed
        decoder = model.get_decoder()
        norm = decoder.ln_f if hasattr(decoder, "ln_f") else decoder.norm
        logits = model.get_output_embeddings()(norm(out.hidden_states[block][0]))
    logps = logits.log_softmax(-1)
    return sum(logps[len(prompt) - 1 + i, token] for i, token in enumerate(completion))
