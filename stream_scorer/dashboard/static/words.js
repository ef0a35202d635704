// What the terms mean: tooltips where they appear, and the list at the foot of the page.
export const WORDS = {
  ctr: ["CTR", "Click-through rate: the probability that a shown item is clicked."],
  cvr: ["CVR", "Conversion rate: the probability that a click leads to a conversion."],
  ctcvr: ["CTCVR", "Click and conversion: CTR times CVR. Learned on all impressions, not only on the clicked ones; that is the idea of ESMM."],
  logloss: ["Log loss", "How surprised the model was by what happened, in nats an example. Lower is better. Each example is predicted before it is learned from, so this is never training loss."],
  pcoc: ["PCOC", "Predicted over observed: the sum of predicted probabilities over the number of clicks (or conversions) seen. 1.0 is calibrated; 2.0 promises twice too much."],
  auc: ["AUC", "The chance that a positive is ranked above a negative. 0.5 is a coin, 1.0 is perfect. It says nothing about calibration."],
  truth: ["Truth AUC", "Only a simulated market knows the true click probability of every candidate. This compares the live scores with it, free of label noise."],
  late: ["Late conversion", "A conversion that comes after its example was first learned from without one. It is sent to the trainer again as a positive, and the loss accounts for it."],
  gate: ["Gate", "A candidate version is compared with the live one on the same recent examples. Worse log loss, PCOC out of bounds or a number that is not finite: it is held."],
  versionlogloss: ["Log loss of a version", "The trainer's progressive CTCVR log loss when it published this version, in nats. Lower is better."],
  lost: ["Lost", "Requests with neither a score nor a reject. The promise is none, whatever is killed."],
  duplicates: ["Duplicates", "Requests scored twice. Delivery is at least once, so a crash may cause a few; consumers can drop them by request id."],
  latency: ["Latency", "From the request's timestamp to its score. p50: half are faster. p99: all but one in a hundred are faster."],
  missing: ["Features missing", "Candidates scored with a default vector, because the feature store had none. Degraded: the store could not answer in time."],
};
