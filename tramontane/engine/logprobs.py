import torch
from tramontane.engine.completion import TokenLogprob


def compute_logprobs(logits, token_ids, num_top):
    lp = torch.log_softmax(logits, -1)
    out = []
    for row, t in zip(lp, token_ids):
        v, i = torch.topk(row, num_top)
        out.append(TokenLogprob(t, float(row[t]), tuple(zip(i.tolist(), v.tolist()))))
    return out
