"""Bugs of masks. Each class has the law that must catch it and words of the diagnosis."""

import math

import torch
from plain import Plain


class Inverted(Plain):
    law, cause = "no_future_leak", "inverted mask"

    def hidden(self, T):
        return ~super().hidden(T)


class SeesTheNext(Plain):
    law, cause = "no_future_leak", "off-by-one mask: every token also attends to the next one"

    def hidden(self, T):
        return torch.ones(T, T, dtype=torch.bool).triu(2)


class BlindToItself(Plain):
    law, cause = "past_is_used", "off-by-one mask: no token attends to itself"

    def hidden(self, T):
        return torch.ones(T, T, dtype=torch.bool).triu(0)


class MaskNotUsed(Plain):
    law, cause = "no_future_leak", "no mask reaches the scores"

    def weights(self, scores):
        scores.masked_fill(self.hidden(scores.shape[-1]), -math.inf)  # the result is discarded
        return scores.softmax(dim=-1)


class MaskAfterSoftmax(Plain):
    law, cause = "identical_tokens_agree", "mask applied after the softmax"

    def weights(self, scores):
        return scores.softmax(dim=-1) * ~self.hidden(scores.shape[-1])


class MaskMultiplied(Plain):
    law, cause = "no_future_leak", "masked scores are 0 instead of -inf"

    def weights(self, scores):
        return (scores * ~self.hidden(scores.shape[-1])).softmax(dim=-1)


class BooleanMaskAdded(Plain):
    law, cause = "no_future_leak", "a boolean mask is added to the scores"

    def weights(self, scores):
        return (scores + self.hidden(scores.shape[-1])).softmax(dim=-1)


class FilledWithTooLittle(Plain):
    law, cause = "mask_survives_large_scores", "filled with a value that other scores can reach"

    def weights(self, scores):
        return scores.masked_fill(self.hidden(scores.shape[-1]), -100.0).softmax(dim=-1)


class CausalInTrainingOnly(Plain):
    law, cause = "causal_in_every_mode", "no mask reaches the scores"

    def hidden(self, T):
        return super().hidden(T) & self.training


class FastPathWithoutMask(Plain):
    law, cause = "causal_in_every_mode", "no mask reaches the scores"

    def hidden(self, T):
        fast = not self.training and not torch.is_grad_enabled()
        return super().hidden(T) & (not fast)


class LeaksInTraining(Plain):
    law, cause = "causal_in_every_mode", "missing in one mode"

    def hidden(self, T):
        return super().hidden(T) & (not self.training)


class GradientSkipsTheMask(Plain):
    law, cause = "no_future_gradient", ""

    def weights(self, scores):
        masked = super().weights(scores)
        unmasked = scores.softmax(dim=-1)
        return masked.detach() + unmasked - unmasked.detach()


class MaskOfTheFirstLength(Plain):
    law, cause = "calls_are_stateless", ""
    kept = None

    def hidden(self, T):
        if self.kept is None or self.kept.shape[0] < T:
            self.kept = super().hidden(T)
        return self.kept[-T:, :T] if self.kept.shape[0] > T else self.kept


class Window(Plain):
    """Right: a token attends to `window` tokens, including itself."""

    def __init__(self, window=4, **sizes):
        super().__init__(**sizes)
        self.sliding_window = window

    def hidden(self, T):
        ones = torch.ones(T, T, dtype=torch.bool)
        return super().hidden(T) | ones.tril(-self.sliding_window)


class WindowTooWide(Window):
    law, cause = "window_counts_its_tokens", "window off by one: 5 tokens instead of 4"

    def hidden(self, T):
        return Plain.hidden(self, T) | torch.ones(T, T, dtype=torch.bool).tril(-5)


class WindowTooNarrow(Window):
    law, cause = "window_counts_its_tokens", "window off by one: 3 tokens instead of 4"

    def hidden(self, T):
        return Plain.hidden(self, T) | torch.ones(T, T, dtype=torch.bool).tril(-3)


class Padded(Plain):
    """Right: True in key_padding_mask (B, T) means padding."""

    def forward(self, x, key_padding_mask=None):
        self.padding = key_padding_mask
        return super().forward(x)

    def weights(self, scores):
        scores = scores.masked_fill(self.hidden(scores.shape[-1]), -math.inf)
        if self.padding is not None:
            scores = scores.masked_fill(self.padded(), -math.inf)
        return torch.nan_to_num(scores.softmax(dim=-1)) if self.safe else scores.softmax(dim=-1)

    safe = True

    def padded(self):
        return self.padding[:, None, None, :]


class PaddingPolarity(Padded):
    law, cause = "hidden_tokens_have_no_influence", "mask of the wrong polarity"

    def padded(self):
        return ~self.padding[:, None, None, :]


class PaddingOfQueries(Padded):
    law, cause = "hidden_tokens_have_no_influence", ""

    def padded(self):
        return self.padding[:, None, :, None]


class EmptyRowsAreNaN(Padded):
    law, cause, safe = "empty_rows_are_finite", "", False


class AdditivePolarity(Plain):
    law, cause = "hidden_tokens_have_no_influence", "mask of the wrong polarity"

    def forward(self, x, attention_mask=None):
        self.given = attention_mask
        return super().forward(x)

    def weights(self, scores):
        if self.given is not None:
            scores = scores + self.given[:, None, None, :].to(scores) * -1e9
        return super().weights(scores)


class MaskLostWithWeights(Plain):
    law, cause = "asking_for_weights_changes_nothing", ""

    def forward(self, x, return_weights=False):
        self.asked = return_weights
        weights, v = self.attend(x)
        y = self.out_proj(self.merge(weights @ v))
        return (y, weights) if return_weights else y

    def hidden(self, T):
        return super().hidden(T) & (not self.asked)


class FirstRowIsEmpty(Plain):
    law, cause = "first_token_is_alone", "no token attends to itself"

    def weights(self, scores):
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(0)
        return scores.masked_fill(hidden, -1e9).softmax(dim=-1)


class EmptyRowIsNaN(BlindToItself):
    law, cause = "output_is_finite", "no token attends to itself"


class MaskOnlyWithoutAutocast(Plain):
    law, cause = "autocast_agrees", ""

    def hidden(self, T):
        return super().hidden(T) & (not torch.is_autocast_enabled("cpu"))


class GivenMaskReplacesCausal(Padded):
    law, cause = "mask_that_shows_all_changes_nothing", ""

    def hidden(self, T):
        return super().hidden(T) & (self.padding is None)


class FillsWhatIsShown(Padded):
    law, cause = "shown_tokens_keep_their_influence", "mask of the wrong polarity"

    def padded(self):
        return ~self.padding[:, None, None, :]


class Encoder(Padded):
    """Right: every token except padding is attended to."""

    flags = {"causal": False}  # noqa: RUF012

    def hidden(self, T):
        return torch.zeros(T, T, dtype=torch.bool)


class ScaledByThePaddedLength(Encoder):
    law, cause = "padding_on_the_right_changes_nothing", ""

    def scores(self, q, k):
        return super().scores(q, k) * math.log(k.shape[-2] + 1)


class CountsFromTheStart(Padded):
    law, cause = "padding_on_the_left_changes_nothing", ""

    def scores(self, q, k):
        return super().scores(q, k * torch.arange(1, k.shape[-2] + 1).to(k)[:, None])


class LeaksBehindABlock(Plain):
    """Blocks of 8: a query in the second block attends to one key too many."""

    law, cause = "no_future_leak_in_long_texts", ""

    def hidden(self, T):
        hidden = super().hidden(T)
        if T > 12:
            hidden[8, 9] = False
        return hidden


class PaddingIgnored(Padded):
    law, cause = "hidden_tokens_have_no_influence", "key_padding_mask is accepted and ignored"

    def forward(self, x, key_padding_mask=None):
        return super().forward(x)


class AttentionMaskPolarity(Plain):
    """By its name True means attend; here it means ignore. It is not an additive mask."""

    law, cause = "hidden_tokens_have_no_influence", "mask of the wrong polarity"
    flags = {"causal": False}  # noqa: RUF012

    def forward(self, x, attention_mask=None):
        q, k, v = (self.split(W(x)) for W in (self.W_query, self.W_key, self.W_value))
        scores = self.scores(q, k)
        if attention_mask is not None:
            scores = scores.masked_fill(attention_mask.bool(), -1e9)
        return self.out_proj(self.merge(scores.softmax(dim=-1) @ v))
