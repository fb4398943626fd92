import pytest
from hypothesis import given
from hypothesis import strategies as st

from locft.data.normalise import collapse_spaces, cut_answer, normalise
from locft.evaluation.metrics import is_match

# Answer, target, whether they match, and what the pair shows. The rule: the answer ends at its first
# full stop or line feed; then both lose case, ASCII punctuation, the words a, an and the, and spare
# white space. Nothing else is unified.
PAIRS = [
    # Case
    ("PARIS", "Paris", True, "capitals"),
    ("ÉMILE ZOLA", "Émile Zola", True, "accented capitals"),
    ("ПУШКИН", "Пушкин", True, "Cyrillic capitals"),
    ("ΟΔΟΣ", "οδος", True, "a capital sigma that ends a word"),
    ("οδοσ", "οδος", False, "a sigma of the wrong form"),
    ("ΑΘΗΝΑ", "Αθήνα", False, "capitals that are written without their accent"),
    ("STRASSE", "Straße", False, "a sharp s in capitals: lower-casing is not case-folding"),
    ("STRAẞE", "Straße", True, "a capital sharp s"),
    ("IRMAK", "ırmak", False, "a dotless i, whose capital is everybody's I"),
    ("\u0130zmir", "izmir", False, "a dotted capital I, which leaves its dot as a combining one"),
    ("\u212a2", "K2", True, "the Kelvin sign, whose lower case is k"),
    ("Ⅳ", "ⅳ", True, "a numeral character that has case"),
    ("ＰＡＲＩＳ", "ｐａｒｉｓ", True, "full-width capitals"),
    # ASCII punctuation
    ("Paris!", "Paris", True, "an exclamation mark"),
    ('"Paris"', "Paris", True, "straight quotes"),
    ("**Paris**", "Paris", True, "Markdown"),
    ("[Paris](city)", "Paris city", False, "brackets leave no space"),
    ("Paris , France", "Paris France", True, "a comma between spaces"),
    ("Paris,France", "Paris France", False, "a comma without a space"),
    ("rock'n'roll", "rocknroll", True, "apostrophes within a word"),
    ("King's Cross", "Kings Cross", True, "a possessive"),
    ("O'Brien", "O Brien", False, "an apostrophe leaves no space"),
    ("Jean-Paul", "JeanPaul", True, "a hyphen"),
    ("Jean-Paul", "Jean Paul", False, "a hyphen leaves no space"),
    ("AC/DC", "ACDC", True, "a slash"),
    ("snake_case", "snakecase", True, "an underscore"),
    ("R & B", "R B", True, "a sign that stands alone"),
    ("AT&T", "AT and T", False, "a sign is not read out"),
    ("C++", "C#", True, "two names that differ in punctuation alone"),
    ("2+2=4", "224", True, "operators leave their digits side by side"),
    ("<b>Rome</b>", "Rome", False, "a tag loses its brackets, not its name"),
    ("Paris<|end|>", "Paris", False, "so does a special token as text"),
    ("a\\b|c~d^e`f", "abcdef", True, "the rarer signs"),
    # Other punctuation
    ("“Paris”", "Paris", False, "curly quotes"),
    ("“Paris”", "“PARIS”", True, "curly quotes on both sides"),
    ("«Paris»", "Paris", False, "angle quotes"),
    ("O’Brien", "O'Brien", False, "a curly apostrophe for a straight one"),
    ("1914–1918", "1914-1918", False, "an en dash for a hyphen"),
    ("1914–1918", "19141918", False, "an en dash stays"),
    ("Paris — France", "Paris France", False, "an em dash is a word of its own"),
    ("Jean\u2010Paul", "Jean-Paul", False, "Unicode's own hyphen"),
    ("Jean\u2011Paul", "JeanPaul", False, "a hyphen that does not break"),
    ("Je\u00adan", "Jean", False, "a soft hyphen, though nobody sees it"),
    ("¿Quién?", "¿quién", True, "of a pair of question marks, the ASCII one"),
    ("Paris…", "Paris", False, "an ellipsis of one character is no full stop"),
    ("a · b", "b", False, "a middle dot"),
    # Money, signs and numbers
    ("$5", "5", True, "a dollar sign is ASCII"),
    ("€5", "5", False, "a euro sign is not"),
    ("5 dollars", "$5", False, "a currency in words"),
    ("100%", "100", True, "a per cent sign"),
    ("100‰", "100", False, "a per mille sign"),
    ("20°", "20", False, "a degree sign"),
    ("-40", "40", True, "a hyphen for a minus"),
    ("−40", "40", False, "a minus sign"),
    ("1,000", "1000", True, "a comma between thousands"),
    ("1 000", "1000", False, "a space between thousands"),
    ("1.000", "1000", False, "a stop between thousands, which ends the answer"),
    ("1'000", "1,000", True, "an apostrophe between thousands"),
    ("3.5", "3.5", False, "a decimal point ends the answer, so it never matches itself"),
    ("3.5", "3", True, "and what comes before it counts"),
    ("35", "3.5", True, "a target only loses its decimal point"),
    ("3,5", "3.5", True, "a decimal comma is dropped, too"),
    (".5", ".5", False, "an answer that begins with a point is empty"),
    ("5.", "5", True, "a stop after a number"),
    ("10:30", "1030", True, "a time of day"),
    ("1/2", "12", True, "a fraction is two digits"),
    ("½", "1/2", False, "a fraction of one character"),
    ("m²", "m2", False, "a raised digit"),
    ("007", "7", False, "leading noughts"),
    ("ten", "10", False, "a number in words"),
    ("1st", "first", False, "an ordinal in words"),
    ("21-st", "21st", True, "an ordinal with a hyphen"),
    ("1º", "1o", False, "an ordinal sign"),
    ("the 1990's", "1990s", True, "a decade"),
    ("VII", "7", False, "a Roman numeral"),
    ("Ⅳ", "IV", False, "a Roman numeral of one character"),
    ("١٢", "12", False, "digits of another script"),
    ("July 4, 1776", "4 July 1776", False, "a date in another order"),
    # Articles
    ("The Beatles", "Beatles", True, "an article that the target lacks"),
    ("Beatles", "the Beatles", True, "an article that the answer lacks"),
    ("a hour", "an hour", True, "the wrong article"),
    ("King of Hill", "King of the Hill", True, "an article in the middle"),
    ("Alexander Great the", "Alexander Great", True, "an article at the end"),
    ("THE END", "end", True, "an article in capitals"),
    ("'The' end", "end", True, "an article in quotes"),
    ("“The” end", "end", False, "an article in curly quotes is another word"),
    ("Athens", "thens", False, "a word that begins with a"),
    ("another", "other", False, "a word that begins with an"),
    ("theatre", "atre", False, "a word that begins with the"),
    ("bathe", "ba", False, "a word that ends in the"),
    ("the-end", "end", False, "a hyphen makes one word before articles are dropped"),
    ("A-Team", "Ateam", True, "and that word stays whole"),
    ("a/an/the", "aanthe", True, "articles without spaces are one word"),
    ("Vitamin A", "Vitamin", True, "a letter that is an article"),
    ("Vitamin A", "Vitamin B", False, "a letter that is not"),
    ("(a) Rome", "Rome", True, "a list's letter a"),
    ("(b) Rome", "Rome", False, "a list's letter b"),
    ("A: Rome", "Rome", True, "the A of an answer"),
    ("à la carte", "la carte", False, "an accented a"),
    ("a\u0301 la carte", "la carte", False, "an a with a combining accent"),
    ("а Rome", "Rome", False, "a Cyrillic а"),
    ("l'eau", "eau", False, "a French article"),
    ("Der Spiegel", "Spiegel", False, "a German article"),
    # Nothing left
    ("", "Rome", False, "no answer"),
    ("", "", True, "no answer to no target"),
    ("The", "A", True, "articles alone are equally nothing"),
    ("?!", "the", True, "so is punctuation alone"),
    (":)", "Rome", False, "nothing for something"),
    ("\u200b", "", False, "a zero-width space is something"),
    ("-", "–", False, "a hyphen is nothing, an en dash is something"),
    # Where an answer ends
    ("Paris. It is the capital", "Paris", True, "a sentence after the answer"),
    ("Paris.It", "Paris", True, "a stop without a space"),
    ("Paris\nQ: Who?", "Paris", True, "a line after the answer"),
    ("Paris\n\n\n", "Paris", True, "line feeds at the end"),
    ("Paris\nis. Rome", "Paris", True, "a line feed before the stop"),
    ("\nParis", "Paris", False, "a line feed before the answer"),
    (". Paris", "Paris", False, "a stop before the answer"),
    ("...", "", True, "stops alone"),
    ("Paris\r\nQ", "Paris", True, "a Windows line end"),
    ("Paris\rQ", "Paris", False, "a carriage return ends nothing"),
    ("Paris\u2028Q", "Paris", False, "a line separator ends nothing"),
    ("Paris\fQ", "Paris Q", True, "a form feed is white space"),
    ("Paris! Yes", "Paris", False, "an exclamation mark ends nothing"),
    ("Paris? Yes", "Paris", False, "a question mark ends nothing"),
    ("Paris; Rome", "Paris", False, "a semicolon ends nothing"),
    ("Paris, France", "Paris", False, "a comma ends nothing"),
    ("Paris (France)", "Paris", False, "brackets end nothing"),
    ("東京。", "東京", False, "an ideographic stop ends nothing, and stays"),
    ("東京．大阪", "東京", False, "nor does a full-width stop"),
    ("दिल्ली।", "दिल्ली", False, "nor does a danda"),
    ("東京.大阪", "東京", True, "an ASCII stop does, in every script"),
    # Targets with stops: they are not cut
    ("U.S.", "U.S.", False, "an abbreviation never matches itself"),
    ("US", "U.S.", True, "only without its stops"),
    ("U", "U.S.", False, "and not by its first letter"),
    ("St. Petersburg", "St. Petersburg", False, "a shortened word ends the answer"),
    ("St Petersburg", "St. Petersburg", True, "unless its stop is left out"),
    ("St. Petersburg", "St", True, "what comes before it counts"),
    ("e.g.", "e.g.", False, "an abbreviation in small letters"),
    ("eg", "e.g.", True, "and without its stops"),
    ("J. K. Rowling", "J. K. Rowling", False, "initials end the answer"),
    ("J K Rowling", "J. K. Rowling", True, "initials without stops"),
    ("JK Rowling", "J. K. Rowling", False, "initials without their space"),
    ("Washington D.C.", "Washington D", True, "a stop at the end of a name"),
    ("A. Einstein", "the", True, "an initial that is an article"),
    ("example.com", "example", True, "the name of a site"),
    ("Rome", "Rome.", True, "a target that ends in a stop"),
    ("Rome", "Rome. Italy", False, "a target of two sentences"),
    ("Rome Italy", "Rome\nItaly", True, "a target of two lines"),
    # Scripts without spaces, and Korean
    ("東京", "東京都", False, "a longer name"),
    ("東 京", "東京", False, "a space where none belongs"),
    ("北京,中国", "北京中国", True, "an ASCII comma"),
    ("北京，中国", "北京中国", False, "a full-width comma"),
    ("「東京」", "東京", False, "corner brackets"),
    ("トウキョウ", "とうきょう", False, "the other kana"),
    ("ﾄｳｷｮｳ", "トウキョウ", False, "half-width kana"),
    ("臺灣", "台灣", False, "a variant character"),
    ("กรุงเทพฯ", "กรุงเทพ", False, "a Thai sign of abbreviation"),
    ("(กรุงเทพ)", "กรุงเทพ", True, "ASCII brackets around Thai"),
    ("서울!", "서울", True, "punctuation after Korean"),
    ("\u1109\u1165\u110b\u116e\u11af", "서울", False, "Korean spelt in single letters"),
    # Accents and look-alikes
    ("cafe", "café", False, "a missing accent"),
    ("cafe\u0301", "caf\u00e9", False, "a combining accent for a composed one"),
    ("CAFE\u0301", "cafe\u0301", True, "a combining accent on both sides"),
    ("Muenchen", "München", False, "an umlaut spelt out"),
    ("ﬁsh", "fish", False, "a ligature"),
    ("Œuvre", "oeuvre", False, "an o and e in one"),
    ("Ｐａｒｉｓ", "Paris", False, "full-width letters"),
    ("Раris", "Paris", False, "Cyrillic letters in a Latin word"),
    # White space, and what only looks like it
    ("  Paris  ", "Paris", True, "spaces at the ends"),
    ("New   York", "New York", True, "several spaces"),
    ("New\tYork", "New York", True, "a tab"),
    ("New\u00a0York", "New York", True, "a no-break space"),
    ("New\u202fYork", "New York", True, "a narrow no-break space"),
    ("New\u3000York", "New York", True, "an ideographic space"),
    ("NewYork", "New York", False, "a missing space"),
    ("New\u200bYork", "New York", False, "a zero-width space is no space"),
    ("New\u200bYork", "NewYork", False, "nor is it nothing"),
    ("\ufeffParis", "Paris", False, "a byte order mark"),
    ("\u200fParis", "Paris", False, "a mark of direction"),
    ("Pa\x00ris", "Paris", False, "a null character"),
    # Emoji
    ("🚀!", "🚀", True, "punctuation after an emoji"),
    ("🚀", "rocket", False, "an emoji for its word"),
    ("Paris 🗼", "Paris", False, "an emoji beside a word"),
    ("👍🏽", "👍", False, "a skin tone"),
    ("\u2764\ufe0f", "\u2764", False, "a variation selector"),
    ("👩\u200d🚀", "👩🚀", False, "a joiner"),
    ("1\ufe0f\u20e3", "1", False, "a keycap"),
    ("#\ufe0f\u20e3", "\ufe0f\u20e3", True, "a keycap that loses its key"),
    # More words, fewer words, other words
    ("Rome", "Paris", False, "another word"),
    ("Paris is the capital of France", "Paris", False, "more words after"),
    ("It is Paris", "Paris", False, "more words before"),
    ("Answer: Paris", "Paris", False, "a label before"),
    ("Paris Paris", "Paris", False, "a word twice"),
    ("Paris or Rome", "Paris", False, "two answers"),
    ("France Paris", "Paris France", False, "another order"),
    ("Parisian", "Paris", False, "a longer word"),
    ("Par", "Paris", False, "a shorter word"),
    ("Pariss", "Paris", False, "a slip of the pen"),
]


@pytest.mark.parametrize(
    ("answer", "target", "matches"), [pair[:3] for pair in PAIRS], ids=[pair[3] for pair in PAIRS]
)
def test_an_answer_matches_by_the_published_rule(answer: str, target: str, matches: bool) -> None:
    assert is_match(answer, target) is matches


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Paris", "paris"),
        ("  The  United\tStates\n", "united states"),
        ("U.S.A.", "usa"),
        ("rock'n'roll", "rocknroll"),
        ("an apple a day", "apple day"),
        ("theatre", "theatre"),
        ("A", ""),
        ("?!", ""),
        ("«Ärger»", "«ärger»"),
        ("a/an/the", "aanthe"),
        ("A - B", "b"),
        ("3.5 %", "35"),
        ("\u0130", "i\u0307"),
        ("New\u00a0York\u200b", "new york\u200b"),
        ("東京。", "東京。"),
    ],
)
def test_case_punctuation_articles_and_spaces_do_not_count(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_an_article_counts_only_as_a_whole_word() -> None:
    assert normalise("a\u0301 la carte") == "a\u0301 la carte"


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Paris. It is", "Paris"),
        ("Paris\nQ:", "Paris"),
        ("St. Petersburg", "St"),
        ("Paris", "Paris"),
        ("\nParis", ""),
        ("Paris\u2028Q", "Paris\u2028Q"),
        ("Paris\r\nQ", "Paris\r"),
        (" Paris .", " Paris "),
        ("3.5", "3"),
        ("...", ""),
        ("", ""),
        ("東京。大阪", "東京。大阪"),
        ("Paris…", "Paris…"),
    ],
)
def test_an_answer_ends_at_a_full_stop_or_line_feed(text: str, expected: str) -> None:
    assert cut_answer(text) == expected


def test_collapsed_prompts_have_single_spaces_and_bare_ends() -> None:
    assert collapse_spaces("  Who\twrote \n it? ") == "Who wrote it?"
