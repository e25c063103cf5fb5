"""Where gatepack finds the linears of a Pebble block."""

import gatepack as gp

gp.register_family(
    "pebble",
    gp.Family(
        attention="mixer",
        q="mixer.ask",
        kv=("mixer.key", "mixer.val"),
        out="mixer.mix",
        up=("left", "right"),
        down="back",
        head_attributes=(),
    ),
)
