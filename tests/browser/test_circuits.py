from hooklens import viz

EDGES = {("embed", "a0.h0.q"): 1.0, ("embed", "a0.h1.v"): -0.5, ("a0.h1", "m0"): 2.0, ("m0", "logits"): 0.25}
HTML = viz.circuit(EDGES)._repr_html_()


def lit(page):
    return set(
        page.evaluate("() => [...document.querySelectorAll('.hl-edge.hl-lit')].map((path) => path.dataset.edge)")
    )


def test_a_node_shows_its_edges_alone(open_page):
    """Edges are numbered by how far their scores are from 0: a0.h1 to m0, embed to a0.h0, embed to a0.h1, m0 up."""
    page = open_page(HTML)
    told, nodes = page.locator(".hl-readout"), page.locator(".hl-node")
    names = [node.locator("text").text_content() for node in nodes.all()]
    assert names == ["embed", "a0.h0", "a0.h1", "m0", "logits"]
    nodes.nth(2).hover()
    assert told.text_content() == "a0.h1 reads embed (v -0.500); is read by m0 (2.00)"
    assert lit(page) == {"0", "2"}
    nodes.first.focus()
    page.mouse.move(1000, 800)
    assert told.text_content() == "embed is read by a0.h0.q (1.00), a0.h1.v (-0.500)"
    assert lit(page) == {"1", "2"}


def test_arrow_keys_move_by_level(open_page):
    page = open_page(HTML)
    page.locator(".hl-node").first.focus()
    for key, name in (("ArrowUp", "a0.h"), ("ArrowUp", "m0"), ("ArrowUp", "logits"), ("Home", "embed")):
        page.keyboard.press(key)
        assert page.locator(".hl-node:focus text").text_content().startswith(name)
    page.keyboard.press("ArrowUp")
    first = page.locator(".hl-node:focus text").text_content()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    others = page.locator(".hl-node:focus text").text_content()
    assert {first, others} <= {"a0.h0", "a0.h1"}


def test_an_edge_is_told(open_page):
    page = open_page(HTML)
    page.locator(".hl-hit[data-edge='3']").dispatch_event("mouseover")
    assert page.locator(".hl-readout").text_content() == "m0 → logits: 0.250"
    assert lit(page) == {"3"}
