"""Everything that molex_serve knows about the inside of transformers' continuous batching, which is made to be changed.

What is used, and so what tests/serve/engine/test_contract.py holds on to:

    logits processors   their list sees all requests of a step with their numbers of tokens, in order, and owns rows of
                        the int32 tensor that takes a step's inputs to the device at once
    output router       gets every output of a step, on the engine's thread
    scheduler           keeps the requests that run and wait, and forgets those that are to leave before a step
    cache               two methods know blocks by tokens, one sizes and one fills its pages
    manager             makes all of these, and calls the model
"""
