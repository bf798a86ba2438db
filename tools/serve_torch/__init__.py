"""serve_torch: the body server on PyTorch; docs/scaling.md says when to use it.

It speaks docs/protocol.md as engine_serve does. Read it in this order:

    connection.py   one stream: handshake, sessions, requests and answers
    frames.py, channel.py, codec.py, messages.py   a step on the wire
    scheduler.py    the thread that runs the steps of all connections together
    body.py         the interface to whatever computes
    torch_body.py   sessions and pages of the KV cache; which rows run together
    torch_model.py  the transformer layers on a device, eager or as CUDA graphs
    parallel.py     the same step on every rank of a tensor-parallel group
"""
