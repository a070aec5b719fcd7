from tests.zoo.conftest import save, tokenizer_folder

__all__ = ["save", "tokenizer_folder"]
