"""Path patching: what senders do through chosen receivers, and through nothing else.

Path patching (Wang et al. 2022; Goldowsky-Dill et al. 2023, "Localizing Model Behavior with Path Patching") asks how
much of a sender's effect goes over some paths of the computational graph (`hooklens.patching.graph`). A path from a
sender to the logits is chosen if it has the form

    sender -> (any number of MLPs, with `through_mlps`) -> a receiver -> anything -> logits

where a receiver is the queries, keys or values of a head, an MLP, or the logits themselves, at which a path ends. With
several receivers the union is chosen: a path that meets two of them is one path, and counts once.

The value of a sender is the metric of one run in which exactly the chosen paths carry the patch, and all others what
they carry in the run that is patched. What a node reads over two paths, of which one is chosen, it reads twice: the
network is unrolled into a tree of paths, as Goldowsky-Dill et al. define it. Two copies of the stream are enough for
that, whatever the number of paths:

- the *direct* one: with what the sender writes in the other run, and what MLPs make of it;
- the *later* one: with what nodes behind receivers make of it. Below the receivers it is the run that is patched.

Receivers read the direct stream, all else reads the later one. With `through_mlps`, each MLP that is no receiver
reads both, and adds to each what it makes of it. A head writes the same to both.

Where receivers are nested (one in block 3, one in block 5) the upper one so reads what heads behind the lower one make
of the change, too. The three passes of Wang et al. (run both prompts; hold all heads and note what the receivers read;
put that in) give the same for receivers that cannot reach each other, and leave those paths out where they can.

`route` knows which stream is read where, `ground` holds the unpatched runs, `passes` runs senders as rows of a batch,
and `path` is the experiment.
"""
