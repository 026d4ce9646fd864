-- append: write events of many jobs, each guarded by its token; renew their leases. Zero events are a heartbeat.
--
-- KEYS  1 open  2 ended  then per job: state, log, spec
-- ARGV  1 lease (ms)  2 number of jobs  then per job:
--       id, token, attempt, seq of the first event, usage (JSON or ''), number of events, events in compact form,
--       closing status or '', and if it is not '': finish reasons (JSON), error (JSON or '')
-- Returns per job {code, last seq}:
--   ok         written
--   duplicate  everything was there already (a lost reply was retried); a known prefix is skipped, the rest written
--   unknown    no such job; nothing is written
--   fenced     a newer attempt holds the job
--   closed     it has ended, not by this call
--   gap        the log ends before the first event: the server lost what was acknowledged; send again from last seq + 1
--   error      this job's keys are broken; the message is in the third place
-- flags: allow-oom
-- uses: _ending

local now = server_ms()
local at = string.format('%.3f', now / 1000)
local lease = tonumber(ARGV[1])
local arg = 3

local function publish(channel, seq, attempt, event)
  local head = '{"v":1,"seq":' .. seq .. ',"attempt":' .. attempt .. ',"at":' .. at
  local kind = string.byte(event)
  if kind == 34 then -- a JSON string: content of choice 0
    event = head .. ',"type":"chunk","index":0,"delta":{"content":' .. event .. '},"n":1}'
  elseif kind == 91 then -- [index, n, "text"]
    local index, n, text = string.match(event, '^%[(%d+),(%d+),(.*)%]$')
    event = head .. ',"type":"chunk","index":' .. index .. ',"delta":{"content":' .. text .. '},"n":' .. n .. '}'
  else
    event = head .. ',' .. string.sub(event, 2)
  end
  redis.call('PUBLISH', channel, event)
end

local function append(id, state, log, spec)
  local token, attempt, first, usage = ARGV[arg + 1], ARGV[arg + 2], tonumber(ARGV[arg + 3]), ARGV[arg + 4]
  local count = tonumber(ARGV[arg + 5])
  local events = arg + 6
  local closing = ARGV[events + count]
  local s = redis.call('HMGET', state, 'status', 'token', 'attempt', 'seq', 'lease', 'writer')
  local seq = tonumber(s[4])
  if not s[1] then
    return {'unknown', 0}
  end
  if s[2] ~= token or s[3] ~= attempt then
    return {'fenced', seq}
  end
  local last = first + count - 1
  if CLOSED[s[1]] then
    if count > 0 and last <= seq and s[6] == token then
      return {'duplicate', seq}
    end
    return {'closed', seq}
  end
  if s[1] ~= 'in_progress' then -- it was handed back: this attempt is over
    return {'fenced', seq}
  end
  if first > seq + 1 then
    return {'gap', seq}
  end

  if usage ~= '' then
    redis.call('HSET', state, 'usage', usage)
  end
  -- Renewing only when a tenth has passed saves two writes on nearly every call.
  if closing == '' and tonumber(s[5]) - now < lease * 0.9 then
    redis.call('HSET', state, 'lease', now + lease)
    redis.call('ZADD', KEYS[1], now + lease, id)
  end
  if count == 0 then
    return {'ok', seq}
  end
  if last <= seq then
    return {'duplicate', seq}
  end

  local skip = seq + 1 - first
  local ending = closing ~= '' and 1 or 0
  local from, to = events + skip, events + count - 1 - ending
  if from <= to then
    redis.call('XADD', log, (last - ending) .. '-0', 'a', attempt, 't', now, 'e',
      '[' .. table.concat(ARGV, ',', from, to) .. ']')
    local channel = string.sub(log, 1, -4) .. 'chunks'
    for i = from, to do
      publish(channel, first + (i - events), attempt, ARGV[i])
    end
  end
  if ending == 0 then
    redis.call('HSET', state, 'seq', last)
    return {'ok', last}
  end
  redis.call('HSET', state, 'finish_reasons', ARGV[events + count + 1], 'error', ARGV[events + count + 2])
  end_job({id, state, log, spec}, KEYS[1], KEYS[2], now, last, attempt, closing, ARGV[events + count - 1], token)
  return {'ok', last}
end

local replies = {}
for i = 1, tonumber(ARGV[2]) do
  local k = 3 * i
  local done, reply = pcall(append, ARGV[arg], KEYS[k], KEYS[k + 1], KEYS[k + 2])
  if done then
    replies[i] = reply
  else
    replies[i] = {'error', 0, type(reply) == 'table' and reply.err or tostring(reply)}
  end
  local closing = arg + 6 + tonumber(ARGV[arg + 5])
  arg = closing + (ARGV[closing] == '' and 1 or 3)
end
return replies
