"""Sentences to compare encoders on."""

# Pairs that mean nearly the same, one after the other.
SENTENCES = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "A monkey is playing the drums.",
    "An ape hits a drum.",
    "The stock market fell sharply today.",
    "Share prices dropped after the announcement.",
    "How do I reset my password?",
    "I forgot my login details.",
    "The doctor prescribed an antibiotic.",
    "She was given medicine against the infection.",
    "It will rain heavily tomorrow.",
    "The forecast says that a storm is coming.",
]
