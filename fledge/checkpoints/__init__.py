"""Checkpoints of hand-written GPTs → models of transformers, with proof.

The steps of a conversion, as `fledge.scripts.convert_checkpoint` runs them:

    loading         a file → tensors by name, without running code from it
    roles           which tensor plays which role: named by the user (mapping), by the table of a known layout
                    (known_layouts), or guessed from shapes and words (guessing, with words, modules, orientation)
    assembly        the tensors under canonical names
    recognition     the canonical GPT (canonical), with every fact that it rests on (facts, settling)
    evidence        facts settled by the author's code (author), or by text (probe_text, race, text_loss); both try the
                    readings that questions lists
    summary         what the conversion rests on, in words
    targets         the canonical GPT as a class of transformers, or with code of its own (custom)
    proof           both compute the same

To add a layout, add its table to known_layouts; to add a target, add its table to targets.
"""
