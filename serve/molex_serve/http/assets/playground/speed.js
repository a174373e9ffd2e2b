// How fast an answer came, as seen from here: the network and the queue count too.

export class Speed {
  constructor() {
    this.asked = performance.now();
    this.first = null;
    this.count = 0;
  }

  arrived(count) {
    if (count === 0) return;
    this.last = performance.now();
    if (this.first === null) {
      this.first = this.last;
      this.atOnce = count;
    }
    this.count += count;
  }

  // What came with the first token was not waited for, so it is no part of the rate.
  describe() {
    if (this.first === null) return "no token";
    const rate = (1000 * (this.count - this.atOnce)) / (this.last - this.first);
    const count = this.count === 1 ? "1 token" : `${this.count} tokens`;
    const parts = [count, `first after ${time(this.first - this.asked)}`];
    if (Number.isFinite(rate) && rate > 0) parts.push(`${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s`);
    return parts.join(" · ");
  }
}

function time(milliseconds) {
  return milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(1)} s`;
}
