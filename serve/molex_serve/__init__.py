"""molex_serve: one base model in memory, many adapters of every kind over it, different ones in one batch.

`molex serve --model ... --adapter law=path` starts it.
"""
