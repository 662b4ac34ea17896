from hypothesis import settings

# The first call of a torch operation takes longer than hypothesis' deadline on a busy machine.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
