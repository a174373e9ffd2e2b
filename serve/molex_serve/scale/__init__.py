"""Past one GPU: the same server in every replica of a Ray Serve deployment, behind stateless ingresses.

    clients -> Ray's proxies -> Ingress (many) -> Engine (one a GPU: base, adapters, engine, the whole HTTP face)
                                      \\-> Directory (one) -> all engines: adapters come and go everywhere or nowhere

An ingress asks for keys, finds out whose adapter a request wants, and hands it as it came to a replica that served this
adapter lately; there it goes through the very application that a single process serves, so every route answers alike.
Only this package imports ray.
"""
