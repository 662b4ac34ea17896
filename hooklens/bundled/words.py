"""The words of the bundled checkpoints: real English, one token each.

The order of `VOCABULARY` is the order of the token ids. A checkpoint carries the vocabulary that it was
trained with in its tokenizer, so a change here reaches a checkpoint when it is trained anew.
"""

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
UNKNOWN = "<|unk|>"
SPECIAL_TOKENS: tuple[str, ...] = (END_OF_TEXT, PAD, UNKNOWN)

PUNCTUATION: tuple[str, ...] = (".", ",", "?", "!", ":", ";", "'", "-")

_NAMES = """
    Mary Anna Lucy Emma Alice Sarah Laura Julia Kate Helen Susan Linda Nancy Carol Diana Clara Rachel Hannah Sophie Ruth
    John Tom Peter Paul James David Simon Martin Daniel Kevin Brian Robert Thomas Michael Andrew George Henry Charles
    Adam Oliver
"""
NAMES: tuple[str, ...] = tuple(_NAMES.split())

_PLACES = """
    store park school office garden kitchen library station market hospital museum restaurant beach theater church hotel
"""
PLACES: tuple[str, ...] = tuple(_PLACES.split())

_OBJECTS = """
    drink book ring ball letter key camera flower cake hat map phone pencil basket ticket bottle
"""
OBJECTS: tuple[str, ...] = tuple(_OBJECTS.split())

_CAPITALS = """
    France Paris; Italy Rome; Spain Madrid; Germany Berlin; Portugal Lisbon; England London; Ireland Dublin;
    Austria Vienna; Poland Warsaw; Hungary Budapest; Greece Athens; Norway Oslo; Sweden Stockholm; Finland Helsinki;
    Denmark Copenhagen; Belgium Brussels; Russia Moscow; Turkey Ankara; Egypt Cairo; Kenya Nairobi; China Beijing;
    Japan Tokyo; Canada Ottawa; Peru Lima
"""
CAPITALS: dict[str, str] = dict(map(str.split, _CAPITALS.split(";")))

_FUNCTION_WORDS = """
    the The a and of to in In on at At for from with near around When After While Before Since Then then As Once so
    when was were is had
"""
_TEMPLATE_WORDS = """
    went left working came lived long talk afterwards met played Yesterday visited Last night Later Friends found Soon
    talked walked saw quiet arrived morning opened reached One day returned waited Finally
    gave handed passed offered sold wanted give decided show bought made threw read story said goodbye sent lent
    brought back told joke capital city called lies
"""
_GENERAL_WORDS = """
    red blue green yellow black white cat dog horse bird fish tree house door window table chair river road sun moon
    star rain snow wind bread milk coffee water music
"""

WORDS: tuple[str, ...] = tuple(
    dict.fromkeys(
        [
            *PUNCTUATION,
            *_FUNCTION_WORDS.split(),
            *_TEMPLATE_WORDS.split(),
            *NAMES,
            *PLACES,
            *OBJECTS,
            *CAPITALS.keys(),
            *CAPITALS.values(),
            *_GENERAL_WORDS.split(),
        ]
    )
)

VOCABULARY: tuple[str, ...] = (*SPECIAL_TOKENS, *WORDS)
