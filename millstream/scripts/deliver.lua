-- deliver: put a further delivery of a job at the head of its RQ queue.
--
-- Its job was accepted before those that wait there, or has waited for its time already; somebody may be watching it.
-- Of several the oldest comes last, so that it stands first: by the head a sweep sees that the others behind it wait.
--
-- KEYS  1 the RQ queue's list  2 RQ's set of queues  3 the delivery's RQ job hash
-- ARGV  1 the queue's name as RQ's set of queues holds it  2 RQ job id  3.. field, value, ... of the RQ job hash
-- Returns 1, or 0 when this very delivery is there already (a lost reply was retried).
-- flags: allow-oom

if redis.call('EXISTS', KEYS[3]) == 1 then
  return 0
end
redis.call('HSET', KEYS[3], unpack(ARGV, 3))
redis.call('SADD', KEYS[2], ARGV[1])
redis.call('LPUSH', KEYS[1], ARGV[2])
return 1
