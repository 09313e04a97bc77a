"""What a processor's instruction sets mean for the speed of torch, and so for ours."""

from collections.abc import Collection

# Named as in /proc/cpuinfo.
MEANINGS = {
    "amx_bf16": "matrix tiles in bf16: prompts and training run at several times the fp32 rate",
    "amx_int8": "matrix tiles in int8, for quantised weights",
    "avx512_bf16": "dot products in bf16: bf16 is computed as such, not converted to fp32",
    "avx512_vnni": "dot products in int8, for quantised weights",
    "avx512f": "vectors of 512 bits",
    "avx2": "vectors of 256 bits: the least for torch's fast kernels",
    "bf16": "matrix products in bf16 on ARM",
    "asimddp": "dot products in int8 on ARM",
}
_X86 = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx512f", "avx2")
_ARM = ("bf16", "asimddp")


def find_instruction_sets(flags: Collection[str]) -> dict[str, bool]:
    """Which of the instruction sets that matter are among the processor's flags."""
    names = _ARM if "asimd" in flags else _X86
    return {name: name in flags for name in names}


def explain_speed(sets: dict[str, bool]) -> list[str]:
    """What to expect from the processor, in sentences."""
    if sets.get("amx_bf16"):
        products = "prompts and training are fastest in bf16 (AMX), several times fp32"
    elif sets.get("avx512_bf16") or sets.get("bf16"):
        products = "bf16 has instructions of its own here: prompts and training may gain over fp32"
    else:
        products = "no instructions for bf16: it halves the memory, but fp32 computes as fast"
    return [
        products,
        "decoding reads every active weight once per token: its limit is memory bandwidth / bytes "
        "of active weights",
    ]
