-- Shared by the scripts that can end a job; the loader puts it in front of those that say `-- uses: _ending`.

local function server_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

-- Append one terminal event, announce it, close the job. `body` is the event's compact JSON object; `writer` is the
-- holder that ended it, empty when somebody else did; nobody holds an ended job.
-- `job` = {id, state key, log key, spec key}. Everything of the job expires at one moment, after its own retention.
local function end_job(job, open, ended, repack, now, seq, attempt, status, body, writer)
  local id, state, log, spec = job[1], job[2], job[3], job[4]
  redis.call('XADD', log, seq .. '-0', 'a', attempt, 't', now, 'e', '[' .. body .. ']')
  redis.call('PUBLISH', string.sub(log, 1, -4) .. 'chunks', '{"v":1,"seq":' .. seq .. ',"attempt":' .. attempt
    .. ',"at":' .. string.format('%.3f', now / 1000) .. ',' .. string.sub(body, 2))
  redis.call('HSET', state, 'status', status, 'seq', seq, 'ended', now, 'writer', writer)
  redis.call('HDEL', state, 'holder', 'lease', 'not_before', 'wait', 'until', 'line', 'place', 'swept', 'queued')
  local retention = tonumber(redis.call('HGET', state, 'retention'))
  redis.call('PEXPIRE', spec, retention)
  redis.call('PEXPIRE', state, retention)
  redis.call('PEXPIRE', log, retention)
  redis.call('ZREM', open, id)
  if redis.call('XLEN', log) > 8 then -- fewer packs fill one node of the stream either way
    redis.call('ZADD', repack, now, id)
    if redis.call('PTTL', repack) < retention then
      redis.call('PEXPIRE', repack, retention) -- by then the logs themselves are gone
    end
  end
  -- 100,000 entries of about 60 bytes: the feed of an hour at 28 jobs/s in 6 MB.
  redis.call('XADD', ended, 'MAXLEN', '~', 100000, '*', 'id', id, 'status', status)
  redis.call('PUBLISH', ended, '{"id":"' .. id .. '","status":"' .. status .. '"}')
end

local CLOSED = {completed = true, incomplete = true, failed = true, cancelled = true}
