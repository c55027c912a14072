"""The words by which authors name the parts of a GPT, in lower case; see `Module.words` for what a word is."""

from itertools import permutations

WEIGHT_OR_BIAS = {
    **dict.fromkeys(("weight", "scale", "gamma", "gain", "alpha", "g", "a_2", "w"), "weight"),
    **dict.fromkeys(("bias", "shift", "beta", "offset", "b", "b_2"), "bias"),
}
"""Last parts of names, and which tensor of a module they mean."""

# The ends of the model.
POSITION = {"pos", "position", "positions", "positional", "wpe", "pe"}
EMBEDDING = {"emb", "embed", "embedding", "embeddings", "wte", "tok", "token", "tokens", "word", "words"}
HEAD = {"head", "output", "out", "logits", "unembed", "unembedding", "decoder", "generator", "classifier", "lm"}
HEAD |= {"proj", "projection", "vocab", "fc", "linear", "final", "to"}
FINAL = {"f", "final", "last", "end"}
OUTSIDE_OF_LAYERS = POSITION | EMBEDDING | {"lm", "logits", "unembed", "head"}

# Attention.
QUERY = ("q", "query", "queries", "wq", "toquery", "toqueries")
KEY = ("k", "key", "keys", "wk", "tokey", "tokeys")
VALUE = ("v", "value", "values", "val", "wv", "tovalue", "tovalues")
FUSED = ("wqkv", "cattn", "inproj", "querykeyvalue")
PROJECTIONS = {
    **dict.fromkeys(QUERY, "query"),
    **dict.fromkeys(KEY, "key"),
    **dict.fromkeys(VALUE, "value"),
    **dict.fromkeys(FUSED, "qkv"),
    **{"".join(order): "".join(order) for order in permutations("qkv")},
}
"""Words of the projections, and their roles; the letters of a fused one stand in the order of its rows."""
OUTPUT = {"o", "out", "output", "wo", "proj", "projection", "cproj", "dense", "unify", "unifyheads"}
SLOPES = {"slopes", "alibi"}

# The MLP.
MLP = {"mlp", "ff", "ffn", "ffwd", "feed", "forward", "feedforward"}
MLP_IN = {"in", "up", "expand", "fc", "cfc", "input", "hidden", "intermediate", "densehto4h"}
MLP_OUT = {"out", "down", "shrink", "contract", "proj", "cproj", "output", "dense4htoh"}
GATE = {"gate", "gating"}
EXPERT = {"expert", "experts"}
SHARED = {"shared"}
ROUTER = {"router", "gate", "gating", "switch"}

# Norms.
NORM = {"norm", "ln", "layernorm", "rmsnorm", "rms", "normalization", "normalisation"}
NORM_1 = {"a", "attn", "attention", "att", "sa", "mha", "input", "in", "pre", "first"}
NORM_2 = {"b", "post", "second"} | MLP
AFTER = {"post", "after"}
EARLY = EMBEDDING | {"in", "input", "pre"}

FOREIGN = {
    **dict.fromkeys(("lambda", "lambdas"), "learned weights of the residual stream"),
    **dict.fromkeys(("ve", "valueembeds", "valueembed"), "value embeddings"),
    "smear": "a mix of each token with the one before it",
}
"""Words of parts that newer research code has and the canonical GPT does not."""
