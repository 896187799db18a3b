"""What docs/heart_disease.md says between its tables."""

INTRODUCTION = """# Heart disease in four hospitals

UCI Heart Disease (Janosi, Steinbrunn, Pfisterer, Detrano 1988, https://doi.org/10.24432/C52P4X, CC BY 4.0) comes from
four hospitals, so it is a federation by nature. FLamby (du Terrail and others 2022, https://arxiv.org/abs/2210.04620)
has a benchmark on it, Fed-Heart-Disease, with published figures. This page has FedClaw's beside them: FLamby's own
protocol first, then what one standardisation for all hospitals changes, then the same with differential privacy.

    python -m experiments.heart_disease data=DIRECTORY

makes it, number by number, with the server's own loop, the sites' own code, real policies and real ledgers, in one
process. The data is not shipped: DIRECTORY is where you have put the four `processed.*.data` files. Every setting is in
`conf/heart_disease.yaml`. The same figures come out again, but for those with privacy: the noise that protects somebody
is drawn from the operating system's randomness, which nobody can repeat.

Rows to train and to test: {sizes}. A logistic regression on 13 features. **Mean of hospitals** is the unweighted mean
of the four accuracies, so that Switzerland's few test rows count as much as Cleveland's; **all test rows** counts
each row once. Accuracies are in percent, mean ± standard deviation over {seeds} (of the initial model and the
batches; the split is the published one, always). The deviations have n in the denominator, as the published ones come
out.

![accuracy of each method beside the published one, and against epsilon]({image})
"""

QUICK = """**This is a quick run: a few steps of everything, to see that it works. Its figures mean nothing.**
"""

PUBLISHED = """## The published table

Each hospital standardises its rows by its own training mean and deviation, as FLamby does.
"""

PROTOCOL = """What the protocol leaves unsaid, and the figures tell: on "all test rows" the rows are standardised by the
pooled training mean and deviation, also for models that were trained on rows standardised by hospital; and the pooled
model, trained on pooled standardisation, is tested on each hospital's own. "local" is each hospital's model on that
hospital's test rows. A stretch of batches begins with a fresh shuffle each round, where FLamby's goes on with the last.
"""

CYCLIC = """**Cyclic.** The published figure is that of a model that never leaves the first hospital. In FLamby's code
each hospital has a copy of the model, a round trains one of the copies, nothing is handed on, and the copy that is
tested is the first hospital's. Cleveland alone, for the four turns of 100 steps that it mostly gets in 15 rounds, has
{alone} and {alone_pooled} on all test rows; published are {theirs} and {theirs_pooled}. The row above is the method
of the paper: the model goes from hospital to hospital, 15 turns in all, {ours} and {ours_pooled}. The two need not
agree, and on all test rows they do not.
"""

SCAFFOLD = """**Scaffold** is FedAvg here, published and in FedClaw: {ours} and {ours_pooled} on all test rows, where
FedAvg has {fedavg} and {fedavg_pooled}. The corrections of the four hospitals have the weighted mean 0, so they change
the mean of the deltas only by what they move the local steps, which is little in 100 steps with learning rate 0.001.
"""

ADAPTIVE = """**FedAdam, FedAdagrad, FedYogi.** FLamby's server steps correct no bias, which is how Reddi and others
print them (2021, Algorithm 2): `bias_correction: false` here. Its Adagrad keeps a decaying mean of the deltas (beta1
= 0.9), and tau is so small that v begins at 0. Then Adagrad with the rate 0.316228 and Yogi with the rate 0.01 are
one and the same: while v stays below every squared delta, Yogi's v is 0.001 times Adagrad's, and its rate sqrt(0.001)
times. That is why their rows are equal, there and here.
"""

SHARED = """## One standardisation for all hospitals

Standardising each hospital by itself throws away what differs between them: that in Switzerland all training patients
are ill, and that their cholesterol was never measured (it is 0), cannot be seen any more. A mean and a deviation that
all share keep it. They need no pooling of rows: `standardise: federated` in the schema takes them from
`fedclaw.statistics`, a release under differential privacy inside a secure sum, epsilon 1 at delta 0.001. `pooled` is
the reference that pools the rows, for training and for statistics; every other row has released statistics. Nothing
else is changed.
"""

RECIPE = """**recipe** is FedClaw's own: {settings}. It has {mean}, where the best published federated mean is
{best:.2f}: {gain:+.1f} points. By hospital: {centres}. Weighting the hospitals alike is what the score asks for: it
counts each hospital once, and so does what is minimised.
"""

RECIPE_SEARCH = """It was chosen without any test row, by cross-validation inside each hospital's training rows
(`python -m experiments.heart_disease search`): hospitals train on four fifths of their training rows, with statistics
of those alone, and are tested on the last fifth; the score is the table's own. The best of the candidates is the
recipe:
"""

PRIVATE = """## With differential privacy

(epsilon, {delta:g}) for each hospital, of one training example being there or not, for the statistics and all of the
training together. A hospital's ledger refuses what would go beyond; **together** is what it says at the end, for the
hospital that paid most. It composes by privacy loss distributions, so the parts add up to more than the whole.

FLamby publishes a mean of {published:.2f} with FedAvg at a nominal epsilon of 1 and delta 0.001. That is no guarantee
to compare with: its accountant was told of 15 epochs where each client takes 1,500 steps, the batches are shuffled
where the accountant counts on Poisson samples, all clients draw their noise from one seed, and the standardisation by
each hospital's own rows is outside of what was counted.
"""

PRIVATE_READING = """A fifth of the budget goes to the statistics. Training is full-batch gradient descent with clipped
gradients, one step a round; sampled batches were not tried.

- **all hospitals', in shares**: each adds a share of the noise inside secure aggregation, and only the sum is ever seen
  (`central.noise_by=sites unit=example`). It holds towards everybody, the server included, as long as no more than one
  of the four tells the server its noise: three shares are enough, so the sum of four has sqrt(4/3) = 1.15 times the
  noise that is counted. Each hospital's ledger is charged.
- **each hospital's own**: each adds all the noise that it needs before anything leaves it (DP-SGD with its own ledger),
  and trusts nobody. The sum of four has twice the noise that one for all would have.
"""

PRIVATE_SEARCH = """The settings were chosen on made-up hospitals of the same sizes and format, at epsilon 5, whose
features' effects are drawn anew for each seed. To choose them on the private rows would have cost privacy that is not
in the budget; test rows were not looked at either. Both bests lie in a corner of the grid, so that settings
beyond it may be better still. The differences between neighbours are small beside those between made-up hospitals.
"""

LIMITS = """## Limits

The test sets are small: one row is 6 points of Switzerland's accuracy, and 1.6 points of the mean of hospitals. A
standard deviation over seeds says nothing of that, for the split is always the same; differences of a point or two
between rows are within what other test rows would change. The recipe's cross-validation looks at the training rows many
times, and at statistics released for each fold, and would cost privacy if it had to be private. The sites' ranges for
the statistics are from what is known of such measurements, and rows that leave them are refused.
"""
