"""What the engine offers, used together: each test compares with a slow, plain network of its own."""
