"""Text, tokens and generation."""

import numpy as np
from torch import Tensor
from typing_extensions import assert_type

import hooklens as hl
from hooklens.generation import GenerationOutput, GenerationStep
from hooklens.tokens import TokenBatch

model = hl.HookedCausalLM.from_pretrained("bundled:tiny-llama")
prompt = "When Mary and John went to the store"

tokens = model.to_tokens(prompt)
assert_type(tokens, Tensor)
assert_type(model.to_tokens([prompt, "Mary"], padding_side="left", return_attention_mask=True), TokenBatch)
ids, mask = model.to_tokens([prompt, "Mary"], return_attention_mask=True)
print(model(ids, attention_mask=mask).shape)

words = model.to_str_tokens(prompt)
assert_type(words, list[str])
assert_type(model.to_str_tokens([1, 2]), list[str])
assert_type(model.to_str_tokens([prompt, "Mary"]), list[list[str]])
print(words[0].strip(), model.to_str_tokens(tokens[0])[0].strip(), model.to_str_tokens(np.array([1, 2]))[0].strip())
assert_type(model.to_string(3), str)
assert_type(model.to_string([3, 4]), str)
assert_type(model.to_string([[3, 4], [5]]), list[str])
print(model.to_string(tokens[0]).strip(), [text.strip() for text in model.to_string(tokens)])
assert_type(model.to_single_token(" Mary"), int)
assert_type(model.to_single_str_token(tokens[0, -1].item()), str)
assert_type(model.to_string(model(prompt)[0, -1].argmax().item()), str)
assert_type(model.get_token_position(" Mary", prompt), int)
assert_type(model.tokens_to_residual_directions(" Mary"), Tensor)

text = model.generate(prompt, max_new_tokens=2, verbose=False)
assert_type(text, str)
assert_type(model.generate([prompt, "Mary"], max_new_tokens=2, verbose=False), list[str])
assert_type(model.generate(prompt, max_new_tokens=2, num_return_sequences=2, verbose=False), str | list[str])
assert_type(model.generate(tokens, max_new_tokens=2, do_sample=False, verbose=False), Tensor)
assert_type(model.generate(prompt, max_new_tokens=2, return_type="tokens", verbose=False), Tensor)
assert_type(model.generate(tokens, max_new_tokens=2, return_type="str", verbose=False), str | list[str])
output = model.generate(prompt, max_new_tokens=2, return_type="output", names_filter="resid_post", verbose=False)
assert_type(output, GenerationOutput)
assert_type(output.cache, hl.ActivationCache | None)
for step in model.generate_stream(prompt, max_new_tokens=2, temperature=0.5, seed=0):
    assert_type(step, GenerationStep)
