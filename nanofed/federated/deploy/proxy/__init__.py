"""What faces the network: a TLS proxy that lets registered sites make the fleet's calls, and nothing else.

A SuperLink answers three APIs on one port: Fleet (the sites'), Control (submit a run: have code run on every site) and Runtime
(the ServerApp's). It parses bodies before it knows who sent them, and takes a signature again within 310 seconds. So it binds
loopback, and this process stands in front: `python -m nanofed.federated.deploy.proxy --help`.

What is covered, and by what:

- Eavesdropping and meddling on the way: TLS 1.2 or later, with a certificate of the federation's own authority (`keys.py`).
- Strangers: each request carries a site's public key and its signature over a time (Flower's SuperNode authentication); key,
  time and signature are checked here, before the body is read, and once more by Flower. A site whose `NAME.pub` is taken away is
  refused within seconds.
- Replays: a signature counts once. It covers a time only, not the path or the body, so this matters only where TLS was broken
  or a site leaks its own traffic. What was signed before the proxy began is refused, since it cannot know whether it was used.
  Flower signs each attempt of a call anew, so nobody who retries is refused; what is refused for this is told to try again (503).
- Control and Runtime calls, documentation, registering by oneself: not among the twelve paths that are passed.
- Requests that two parsers read differently: heads are parsed strictly by h11 and written anew, with one Content-Length, a fixed
  Host and known headers; chunked bodies, upgrades, HTTP other than 1.1, pipelining and any path but those twelve, letter by
  letter, are refused.
- Exhaustion: bytes of a head and a body, seconds of a handshake, a head, a body and an idle connection, connections in all and an
  address, handshakes and requests a second and an address, bytes of a site's bodies at a time. Half of all connections are kept
  for addresses from which a site has called, which are remembered through restarts; where the others are used up, the oldest
  one on which nothing was asked for makes room.

What is not:

- A site that is trusted and lies. It holds a valid key; which calls it may make is decided by `server/fleet_rules.py` in the
  SuperLink's process, and what it sends is checked by `server/validation.py`.
- A stolen site key, until its file is taken away. A stolen authority: everything.
- A flood that fills the line or comes from very many addresses.
- Whoever may run processes as this user on the server's machine, or reaches its loopback: Control needs no credentials there.
- What the sites can learn: TLS ends here, the server reads every update. There is no secure aggregation, no differential privacy.
"""
